//! Both ends of `invoke bench network`, as a component and, from the same source, as a native program.
//!
//!     echo-load sleep SECONDS
//!     echo-load serve PORT                       everything comes back
//!     echo-load load ADDRESS PORT COUNT SECONDS  one JSON line: microseconds from connect to the first byte of COUNT
//!                                                connections, then how many echoes one connection gave in SECONDS
//!     echo-load reach PORT ADDRESS...            one JSON line: how many of the addresses echoed
//!
//! A request is a line of 16 bytes. The next is sent when the answer is there.

use std::process::exit;
use std::time::{Duration, Instant};

const REQUEST: &[u8] = b"fifteen letters\n";
const WARM: usize = 20;
const BLOCK: usize = 16 * 1024;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["sleep", seconds] => Ok(std::thread::sleep(Duration::from_secs(number(seconds) as u64))),
        ["serve", port] => net::serve(number(port) as u16),
        ["load", address, port, count, seconds] => {
            load(address, number(port) as u16, number(count), number(seconds) as u64)
        }
        ["reach", port, addresses @ ..] => reach(number(port) as u16, addresses),
        _ => Err("echo-load [sleep SECONDS | serve PORT | load ADDRESS PORT COUNT SECONDS | reach PORT ADDRESS...]".to_string()),
    };
    if let Err(error) = done {
        eprintln!("{error}");
        exit(1);
    }
}

fn number(text: &str) -> usize {
    text.parse().unwrap_or_else(|_| {
        eprintln!("{text} is no number");
        exit(2);
    })
}

fn load(address: &str, port: u16, count: usize, seconds: u64) -> Result<(), String> {
    let mut first = Vec::new();
    for number in 0..WARM + count {
        let begun = Instant::now();
        let mut connection = net::connect(address, port)?;
        connection.write(REQUEST)?;
        let mut got = connection.read()?;
        let taken = begun.elapsed().as_micros();
        while got < REQUEST.len() {
            got += connection.read()?;
        }
        if number >= WARM {
            first.push(taken.to_string());
        }
    }
    let mut connection = net::connect(address, port)?;
    let begun = Instant::now();
    let mut requests = 0u64;
    while begun.elapsed() < Duration::from_secs(seconds) {
        connection.write(REQUEST)?;
        let mut got = 0;
        while got < REQUEST.len() {
            got += connection.read()?;
        }
        requests += 1;
    }
    let taken = begun.elapsed().as_secs_f64();
    println!("{{\"first_byte_us\": [{}], \"requests\": {requests}, \"seconds\": {taken:.6}}}", first.join(", "));
    Ok(())
}

fn reach(port: u16, addresses: &[&str]) -> Result<(), String> {
    let mut reached = 0;
    for address in addresses {
        let one = net::connect(address, port).and_then(|mut connection| {
            connection.write(REQUEST)?;
            connection.read()
        });
        match one {
            Ok(_) => reached += 1,
            Err(error) => eprintln!("{address}: {error}"),
        }
    }
    println!("{{\"reached\": {reached}}}");
    Ok(())
}

#[cfg(not(target_os = "wasi"))]
mod net {
    use super::BLOCK;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::time::Duration;

    const CONNECT: Duration = Duration::from_secs(10);

    pub struct Connection(TcpStream);

    pub fn connect(address: &str, port: u16) -> Result<Connection, String> {
        let whole: SocketAddr = format!("{address}:{port}").parse().map_err(|error| format!("{address}: {error}"))?;
        TcpStream::connect_timeout(&whole, CONNECT).map(Connection).map_err(|error| format!("connect: {error}"))
    }

    impl Connection {
        pub fn write(&mut self, data: &[u8]) -> Result<(), String> {
            self.0.write_all(data).map_err(|error| format!("write: {error}"))
        }

        pub fn read(&mut self) -> Result<usize, String> {
            match self.0.read(&mut [0; BLOCK]).map_err(|error| format!("read: {error}"))? {
                0 => Err("the connection was closed".to_string()),
                got => Ok(got),
            }
        }
    }

    pub fn serve(port: u16) -> Result<(), String> {
        let listener = TcpListener::bind(("0.0.0.0", port)).map_err(|error| format!("bind {port}: {error}"))?;
        println!("listening on port {port}");
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut block = [0; BLOCK];
                while let Ok(got) = stream.read(&mut block) {
                    if got == 0 || stream.write_all(&block[..got]).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(())
    }
}

#[cfg(target_os = "wasi")]
mod net {
    use super::BLOCK;
    use wasip2::io::poll::{poll, Pollable};
    use wasip2::io::streams::{InputStream, OutputStream};
    use wasip2::sockets::instance_network::instance_network;
    use wasip2::sockets::network::{ErrorCode, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress};
    use wasip2::sockets::tcp::TcpSocket;
    use wasip2::sockets::tcp_create_socket::create_tcp_socket;

    pub struct Connection {
        // Fields are dropped in this order, and a stream must go before its socket.
        readable: Pollable,
        input: InputStream,
        output: OutputStream,
        _socket: TcpSocket,
    }

    pub fn connect(address: &str, port: u16) -> Result<Connection, String> {
        let plain: std::net::Ipv4Addr = address.parse().map_err(|error| format!("{address}: {error}"))?;
        let [a, b, c, d] = plain.octets();
        let remote = IpSocketAddress::Ipv4(Ipv4SocketAddress { port, address: (a, b, c, d) });
        let socket = create_tcp_socket(IpAddressFamily::Ipv4).map_err(|error| format!("create: {error:?}"))?;
        socket.start_connect(&instance_network(), remote).map_err(|error| format!("connect: {error:?}"))?;
        let (input, output) = loop {
            match socket.finish_connect() {
                Err(ErrorCode::WouldBlock) => socket.subscribe().block(),
                other => break other.map_err(|error| format!("connect: {error:?}"))?,
            }
        };
        Ok(Connection { readable: input.subscribe(), input, output, _socket: socket })
    }

    impl Connection {
        pub fn write(&mut self, data: &[u8]) -> Result<(), String> {
            self.output.blocking_write_and_flush(data).map_err(|error| format!("write: {error:?}"))
        }

        pub fn read(&mut self) -> Result<usize, String> {
            self.input.blocking_read(BLOCK as u64).map(|data| data.len()).map_err(|error| format!("read: {error:?}"))
        }

        /// False: the connection is over.
        fn echo(&mut self) -> bool {
            match self.input.read(BLOCK as u64) {
                Ok(data) => data.chunks(4096).all(|block| self.output.blocking_write_and_flush(block).is_ok()),
                Err(_) => false,
            }
        }
    }

    pub fn serve(port: u16) -> Result<(), String> {
        let everywhere = IpSocketAddress::Ipv4(Ipv4SocketAddress { port, address: (0, 0, 0, 0) });
        let listener = create_tcp_socket(IpAddressFamily::Ipv4).map_err(|error| format!("create: {error:?}"))?;
        listener.start_bind(&instance_network(), everywhere).map_err(|error| format!("bind {port}: {error:?}"))?;
        listener.finish_bind().map_err(|error| format!("bind {port}: {error:?}"))?;
        listener.set_listen_backlog_size(512).ok();
        listener.start_listen().map_err(|error| format!("listen {port}: {error:?}"))?;
        listener.finish_listen().map_err(|error| format!("listen {port}: {error:?}"))?;
        println!("listening on port {port}");
        let incoming = listener.subscribe();
        let mut connections: Vec<Connection> = Vec::new();
        loop {
            let ready = {
                let mut waited: Vec<&Pollable> = vec![&incoming];
                waited.extend(connections.iter().map(|connection| &connection.readable));
                poll(&waited)
            };
            let mut ended = Vec::new();
            for index in ready {
                if index == 0 {
                    while let Ok((socket, input, output)) = listener.accept() {
                        connections.push(Connection { readable: input.subscribe(), input, output, _socket: socket });
                    }
                } else if !connections[index as usize - 1].echo() {
                    ended.push(index as usize - 1);
                }
            }
            ended.sort_unstable();
            for index in ended.into_iter().rev() {
                connections.swap_remove(index);
            }
        }
    }
}
