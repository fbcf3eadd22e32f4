//! One thread that serves all ports: `poll` tells which of them has something, and a handler answers at once.

use std::rc::Rc;

use wasip2::io::poll::{poll, Pollable};

use crate::grpc;
use crate::http::{self, Reply, Request};
use crate::net::{self, Datagrams, Failure, Listener, Stream};
use crate::streams;

pub type Handler = Rc<dyn Fn(&Request) -> Reply>;
type Answer = Rc<dyn Fn(&str, &str) -> Option<String>>;

#[derive(Clone)]
pub enum Speaks {
    Http(Handler),
    /// These bytes, then the end.
    Bytes(String),
    /// gRPC's health service: what it says of a service by name, None: it does not know it.
    Health(Rc<dyn Fn(&str) -> Option<bool>>),
}

struct Connection {
    stream: Stream,
    speaks: Speaks,
    peer: String,
    data: Vec<u8>,
    health: grpc::Session,
}

#[derive(Default)]
pub struct Server {
    listeners: Vec<(Listener, Speaks)>,
    datagrams: Vec<(Datagrams, Answer)>,
    connections: Vec<Connection>,
}

/// A line as Go's log package writes it; tests look for the words.
pub fn log(line: &str) {
    eprintln!("{}", line);
}

impl Server {
    pub fn tcp(&mut self, port: u16, speaks: Speaks) -> Result<(), Failure> {
        self.listeners.push((Listener::open(port)?, speaks));
        Ok(())
    }

    pub fn http(&mut self, port: u16, handler: Handler) -> Result<(), Failure> {
        self.tcp(port, Speaks::Http(handler))
    }

    pub fn udp(&mut self, port: u16, answer: Answer) -> Result<(), Failure> {
        self.datagrams.push((Datagrams::open(port, None)?, answer));
        Ok(())
    }

    pub fn run(mut self) -> ! {
        loop {
            let ready = {
                let mut waited: Vec<&Pollable> = self.listeners.iter().map(|(listener, _)| &listener.incoming).collect();
                waited.extend(self.datagrams.iter().map(|(datagrams, _)| &datagrams.readable));
                waited.extend(self.connections.iter().map(|connection| &connection.stream.readable));
                poll(&waited)
            };
            let (tcp, udp) = (self.listeners.len(), self.listeners.len() + self.datagrams.len());
            let mut over = Vec::new();
            for index in ready.into_iter().map(|index| index as usize) {
                if index < tcp {
                    self.accept(index);
                } else if index < udp {
                    self.answer(index - tcp);
                } else if !self.connections[index - udp].turn() {
                    over.push(index - udp);
                }
            }
            over.sort_unstable();
            for index in over.into_iter().rev() {
                self.connections.remove(index);
            }
        }
    }

    fn accept(&mut self, index: usize) {
        let (listener, speaks) = &self.listeners[index];
        while let Some(stream) = listener.accept() {
            let peer = stream.peer();
            if let Speaks::Bytes(bytes) = speaks {
                log(&format!("TCP request from {}", peer));
                stream.write(bytes.as_bytes());
                continue;
            }
            let (data, health) = (Vec::new(), grpc::Session::default());
            self.connections.push(Connection { stream, speaks: speaks.clone(), peer, data, health });
        }
    }

    fn answer(&self, index: usize) {
        let (datagrams, answer) = &self.datagrams[index];
        for (data, from) in datagrams.take().unwrap_or_default() {
            let text = String::from_utf8_lossy(&data);
            if let Some(back) = answer(text.trim(), &net::shown(from)) {
                if let Err(why) = datagrams.send(back.as_bytes(), Some(from)) {
                    log(&format!("failed to write to UDP client {}: {}", net::shown(from), why));
                }
            }
        }
    }
}

impl Connection {
    /// False: it is over.
    fn turn(&mut self) -> bool {
        match self.stream.take() {
            Some(data) => self.data.extend(data),
            None => return false,
        }
        match &self.speaks {
            Speaks::Bytes(_) => false,
            Speaks::Health(state) => match self.health.turn(&mut self.data, state.as_ref()) {
                Some(out) => self.stream.write(&out),
                None => false,
            },
            Speaks::Http(handler) => {
                while let Some(request) = http::take_request(&mut self.data, &self.peer) {
                    let reply = handler(&request);
                    let sent = self.stream.write(&reply.bytes(&request));
                    if let Some(code) = reply.exit {
                        streams::leave(code);
                    }
                    if !sent || !request.keeps() {
                        return false;
                    }
                }
                if http::malformed(&self.data) {
                    let text = "400 Bad Request";
                    let (head, kind) = ("HTTP/1.1 400 Bad Request", "text/plain; charset=utf-8");
                    let reply = format!("{}\r\nContent-Type: {}\r\nConnection: close\r\n\r\n{}", head, kind, text);
                    self.stream.write(reply.as_bytes());
                    return false;
                }
                true
            }
        }
    }
}
