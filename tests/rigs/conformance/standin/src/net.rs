//! Connections over wasi:sockets, as far as the stand-ins need them: IPv4, and every wait has an end.

use std::time::{Duration, Instant};

use wasip2::clocks::monotonic_clock::subscribe_duration;
use wasip2::io::poll::{poll, Pollable};
use wasip2::io::streams::{InputStream, OutputStream, StreamError};
use wasip2::sockets::instance_network::instance_network;
use wasip2::sockets::ip_name_lookup::resolve_addresses;
use wasip2::sockets::network::{ErrorCode, IpAddress, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress};
use wasip2::sockets::tcp::TcpSocket;
use wasip2::sockets::tcp_create_socket::create_tcp_socket;
use wasip2::sockets::udp::{IncomingDatagramStream, OutgoingDatagram, OutgoingDatagramStream, UdpSocket};
use wasip2::sockets::udp_create_socket::create_udp_socket;

pub const BLOCK: u64 = 16 * 1024;
const WRITE: usize = 4096;

pub type Ip = (u8, u8, u8, u8);

/// Why there is no connection, in the classes that `agnhost connect` tells apart.
#[derive(Debug)]
pub enum Failure {
    Dns(String),
    Refused,
    Timeout,
    Other(String),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Failure::Dns(why) => write!(f, "DNS: {}", why),
            Failure::Refused => write!(f, "REFUSED: connection refused"),
            Failure::Timeout => write!(f, "TIMEOUT: timed out"),
            Failure::Other(why) => write!(f, "OTHER: {}", why),
        }
    }
}

impl From<ErrorCode> for Failure {
    fn from(code: ErrorCode) -> Failure {
        match code {
            ErrorCode::ConnectionRefused => Failure::Refused,
            ErrorCode::Timeout => Failure::Timeout,
            other => Failure::Other(format!("{:?}", other)),
        }
    }
}

pub fn shown(address: IpSocketAddress) -> String {
    match address {
        IpSocketAddress::Ipv4(Ipv4SocketAddress { port, address: (a, b, c, d) }) => format!("{}.{}.{}.{}:{}", a, b, c, d, port),
        IpSocketAddress::Ipv6(address) => format!("[{:?}]:{}", address.address, address.port),
    }
}

pub fn text(ip: Ip) -> String {
    format!("{}.{}.{}.{}", ip.0, ip.1, ip.2, ip.3)
}

fn at(address: Ip, port: u16) -> IpSocketAddress {
    IpSocketAddress::Ipv4(Ipv4SocketAddress { port, address })
}

/// Until the moment, or for ever without one; false: it has passed.
fn wait(pollable: &Pollable, until: Option<Instant>) -> bool {
    match until {
        None => {
            pollable.block();
            true
        }
        Some(until) => {
            let left = until.saturating_duration_since(Instant::now());
            let timer = subscribe_duration(left.as_nanos() as u64);
            poll(&[pollable, &timer]).contains(&0)
        }
    }
}

fn end(limit: Option<Duration>) -> Option<Instant> {
    limit.map(|limit| Instant::now() + limit)
}

pub fn parse_ip(host: &str) -> Option<Ip> {
    let parsed: std::net::Ipv4Addr = host.parse().ok()?;
    let [a, b, c, d] = parsed.octets();
    Some((a, b, c, d))
}

/// The IPv4 addresses of a name, as the pod's resolver gives them.
pub fn lookup_all(host: &str) -> Result<Vec<Ip>, Failure> {
    if let Some(ip) = parse_ip(host) {
        return Ok(vec![ip]);
    }
    let why = |code: ErrorCode| Failure::Dns(format!("lookup {}: {:?}", host, code));
    let stream = resolve_addresses(&instance_network(), host).map_err(why)?;
    let until = Instant::now() + Duration::from_secs(15);
    let mut found = Vec::new();
    loop {
        match stream.resolve_next_address() {
            Ok(Some(IpAddress::Ipv4(ip))) => found.push(ip),
            Ok(Some(_)) => {}
            Ok(None) if found.is_empty() => return Err(Failure::Dns(format!("lookup {}: no IPv4 address", host))),
            Ok(None) => return Ok(found),
            Err(ErrorCode::WouldBlock) if wait(&stream.subscribe(), Some(until)) => {}
            Err(code) => return Err(why(code)),
        }
    }
}

pub fn lookup(host: &str) -> Result<Ip, Failure> {
    Ok(lookup_all(host)?[0])
}

/// A TCP connection. Its fields are dropped in this order: streams must go before their socket.
pub struct Stream {
    pub readable: Pollable,
    input: InputStream,
    output: OutputStream,
    socket: TcpSocket,
}

impl Stream {
    fn new(socket: TcpSocket, input: InputStream, output: OutputStream) -> Stream {
        Stream { readable: input.subscribe(), input, output, socket }
    }

    /// `from`: the address of this end, where it matters.
    pub fn connect(ip: Ip, port: u16, from: Option<Ip>, limit: Option<Duration>) -> Result<Stream, Failure> {
        let network = instance_network();
        let socket = create_tcp_socket(IpAddressFamily::Ipv4)?;
        if let Some(from) = from {
            socket.start_bind(&network, at(from, 0))?;
            socket.finish_bind()?;
        }
        socket.start_connect(&network, at(ip, port))?;
        let until = end(limit);
        loop {
            match socket.finish_connect() {
                Ok((input, output)) => return Ok(Stream::new(socket, input, output)),
                Err(ErrorCode::WouldBlock) if wait(&socket.subscribe(), until) => {}
                Err(ErrorCode::WouldBlock) => return Err(Failure::Timeout),
                Err(code) => return Err(code.into()),
            }
        }
    }

    /// What has come, possibly nothing; None: the other end is done.
    pub fn take(&self) -> Option<Vec<u8>> {
        match self.input.read(BLOCK) {
            Ok(data) => Some(data),
            Err(StreamError::Closed) | Err(StreamError::LastOperationFailed(_)) => None,
        }
    }

    /// Waits for more; Ok(None): the other end is done.
    pub fn read(&self, until: Option<Instant>) -> Result<Option<Vec<u8>>, Failure> {
        loop {
            match self.take() {
                Some(data) if data.is_empty() => {
                    if !wait(&self.readable, until) {
                        return Err(Failure::Timeout);
                    }
                }
                other => return Ok(other),
            }
        }
    }

    pub fn write(&self, data: &[u8]) -> bool {
        data.chunks(WRITE).all(|block| self.output.blocking_write_and_flush(block).is_ok())
    }

    pub fn peer(&self) -> String {
        self.socket.remote_address().map_or_else(|_| "unknown".to_string(), shown)
    }

    pub fn own_ip(&self) -> String {
        let own = self.socket.local_address().map_or_else(|_| String::new(), shown);
        own.rsplit_once(':').map_or(String::new(), |(ip, _)| ip.to_string())
    }
}

pub struct Listener {
    pub incoming: Pollable,
    socket: TcpSocket,
}

impl Listener {
    pub fn open(port: u16) -> Result<Listener, Failure> {
        let network = instance_network();
        let socket = create_tcp_socket(IpAddressFamily::Ipv4)?;
        socket.start_bind(&network, at((0, 0, 0, 0), port))?;
        socket.finish_bind()?;
        socket.set_listen_backlog_size(512).ok();
        socket.start_listen()?;
        socket.finish_listen()?;
        Ok(Listener { incoming: socket.subscribe(), socket })
    }

    pub fn accept(&self) -> Option<Stream> {
        self.socket.accept().ok().map(|(socket, input, output)| Stream::new(socket, input, output))
    }
}

pub struct Datagrams {
    pub readable: Pollable,
    input: IncomingDatagramStream,
    output: OutgoingDatagramStream,
    _socket: UdpSocket,
}

impl Datagrams {
    /// A server's end on a port, or a client's towards `remote`.
    pub fn open(port: u16, remote: Option<(Ip, u16)>) -> Result<Datagrams, Failure> {
        let socket = create_udp_socket(IpAddressFamily::Ipv4)?;
        socket.start_bind(&instance_network(), at((0, 0, 0, 0), port))?;
        socket.finish_bind()?;
        let (input, output) = socket.stream(remote.map(|(ip, port)| at(ip, port)))?;
        Ok(Datagrams { readable: input.subscribe(), input, output, _socket: socket })
    }

    pub fn take(&self) -> Result<Vec<(Vec<u8>, IpSocketAddress)>, Failure> {
        let found = self.input.receive(16)?;
        Ok(found.into_iter().map(|datagram| (datagram.data, datagram.remote_address)).collect())
    }

    pub fn send(&self, data: &[u8], to: Option<IpSocketAddress>) -> Result<(), Failure> {
        while self.output.check_send()? == 0 {
            self.output.subscribe().block();
        }
        self.output.send(&[OutgoingDatagram { data: data.to_vec(), remote_address: to }])?;
        Ok(())
    }

    /// The next answer.
    pub fn read(&self, until: Option<Instant>) -> Result<Vec<u8>, Failure> {
        loop {
            if let Some((data, _)) = self.take()?.into_iter().next() {
                return Ok(data);
            }
            if !wait(&self.readable, until) {
                return Err(Failure::Timeout);
            }
        }
    }
}
