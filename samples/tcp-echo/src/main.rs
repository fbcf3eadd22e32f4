//! An echo server on wasi:sockets, and the client that tries it.
//!
//!     tcp-echo [serve PORT]         TCP and UDP: everything comes back; a line of TCP is told on stdout
//!     tcp-echo connect HOST PORT TEXT   looks the name up, sends a line, prints what comes back
//!     tcp-echo resolve HOST         prints the addresses of a name
//!
//! One thread serves all connections: `poll` tells which of them has something to read.

use std::process::exit;
use wasip2::io::poll::{poll, Pollable};
use wasip2::io::streams::{InputStream, OutputStream, StreamError};
use wasip2::sockets::instance_network::instance_network;
use wasip2::sockets::ip_name_lookup::resolve_addresses;
use wasip2::sockets::network::{ErrorCode, IpAddress, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress, Network};
use wasip2::sockets::tcp::TcpSocket;
use wasip2::sockets::tcp_create_socket::create_tcp_socket;
use wasip2::sockets::udp::{IncomingDatagramStream, OutgoingDatagram, OutgoingDatagramStream, UdpSocket};
use wasip2::sockets::udp_create_socket::create_udp_socket;

const BLOCK: u64 = 16 * 1024;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let network = instance_network();
    let result = match words.as_slice() {
        [] => serve(&network, 7777),
        ["serve", port] => serve(&network, number(port)),
        ["connect", host, port, text] => connect(&network, host, number(port), text),
        ["resolve", host] => resolve(&network, host).map(|found| println!("{}", found.join(" "))),
        _ => {
            eprintln!("tcp-echo [serve PORT | connect HOST PORT TEXT | resolve HOST]");
            exit(2);
        }
    };
    if let Err(error) = result {
        eprintln!("{error}");
        exit(1);
    }
}

fn number(text: &str) -> u16 {
    text.parse().unwrap_or_else(|_| {
        eprintln!("{text} is no port");
        exit(2);
    })
}

struct Connection {
    // Fields are dropped in this order, and a stream must go before its socket.
    readable: Pollable,
    input: InputStream,
    output: OutputStream,
    _socket: TcpSocket,
}

struct Datagrams {
    readable: Pollable,
    input: IncomingDatagramStream,
    output: OutgoingDatagramStream,
    _socket: UdpSocket,
}

fn serve(network: &Network, port: u16) -> Result<(), String> {
    let everywhere = IpSocketAddress::Ipv4(Ipv4SocketAddress { port, address: (0, 0, 0, 0) });
    let listener = create_tcp_socket(IpAddressFamily::Ipv4).map_err(|error| format!("create: {error:?}"))?;
    listener.start_bind(network, everywhere).map_err(|error| format!("bind {port}: {error:?}"))?;
    listener.finish_bind().map_err(|error| format!("bind {port}: {error:?}"))?;
    listener.set_listen_backlog_size(512).ok();
    listener.start_listen().map_err(|error| format!("listen {port}: {error:?}"))?;
    listener.finish_listen().map_err(|error| format!("listen {port}: {error:?}"))?;
    let incoming = listener.subscribe();
    let datagrams = datagrams(network, everywhere)?;
    println!("listening on port {port}");
    let mut connections: Vec<Connection> = Vec::new();
    loop {
        let ready = {
            let mut waited: Vec<&Pollable> = vec![&incoming, &datagrams.readable];
            waited.extend(connections.iter().map(|connection| &connection.readable));
            poll(&waited)
        };
        let mut ended = Vec::new();
        for index in ready {
            match index {
                0 => accept(&listener, &mut connections),
                1 => answer(&datagrams),
                _ if !echo(&connections[index as usize - 2]) => ended.push(index as usize - 2),
                _ => {}
            }
        }
        ended.sort_unstable();
        for index in ended.into_iter().rev() {
            connections.swap_remove(index);
        }
    }
}

fn accept(listener: &TcpSocket, connections: &mut Vec<Connection>) {
    while let Ok((socket, input, output)) = listener.accept() {
        connections.push(Connection { readable: input.subscribe(), input, output, _socket: socket });
    }
}

/// False: the connection is over.
fn echo(connection: &Connection) -> bool {
    match connection.input.read(BLOCK) {
        Ok(data) if data.is_empty() => true,
        Ok(data) => {
            println!("echo {}", String::from_utf8_lossy(&data).trim_end());
            data.chunks(4096).all(|block| connection.output.blocking_write_and_flush(block).is_ok())
        }
        Err(StreamError::Closed) | Err(StreamError::LastOperationFailed(_)) => false,
    }
}

fn datagrams(network: &Network, address: IpSocketAddress) -> Result<Datagrams, String> {
    let socket = create_udp_socket(IpAddressFamily::Ipv4).map_err(|error| format!("create: {error:?}"))?;
    socket.start_bind(network, address).map_err(|error| format!("bind: {error:?}"))?;
    socket.finish_bind().map_err(|error| format!("bind: {error:?}"))?;
    let (input, output) = socket.stream(None).map_err(|error| format!("udp: {error:?}"))?;
    Ok(Datagrams { readable: input.subscribe(), input, output, _socket: socket })
}

fn answer(datagrams: &Datagrams) {
    for datagram in datagrams.input.receive(16).unwrap_or_default() {
        if datagrams.output.check_send().unwrap_or(0) > 0 {
            let back = OutgoingDatagram { data: datagram.data, remote_address: Some(datagram.remote_address) };
            datagrams.output.send(&[back]).ok();
        }
    }
}

fn lookup(network: &Network, host: &str) -> Result<Vec<IpAddress>, String> {
    let stream = resolve_addresses(network, host).map_err(|error| format!("lookup {host}: {error:?}"))?;
    let mut found = Vec::new();
    loop {
        match stream.resolve_next_address() {
            Ok(Some(address)) => found.push(address),
            Ok(None) if found.is_empty() => return Err(format!("lookup {host}: no address")),
            Ok(None) => return Ok(found),
            Err(ErrorCode::WouldBlock) => stream.subscribe().block(),
            Err(error) => return Err(format!("lookup {host}: {error:?}")),
        }
    }
}

fn resolve(network: &Network, host: &str) -> Result<Vec<String>, String> {
    Ok(lookup(network, host)?.into_iter().map(text).collect())
}

fn text(address: IpAddress) -> String {
    match address {
        IpAddress::Ipv4((a, b, c, d)) => format!("{a}.{b}.{c}.{d}"),
        IpAddress::Ipv6((a, b, c, d, e, f, g, h)) => std::net::Ipv6Addr::new(a, b, c, d, e, f, g, h).to_string(),
    }
}

fn connect(network: &Network, host: &str, port: u16, line: &str) -> Result<(), String> {
    let address = lookup(network, host)?
        .into_iter()
        .find_map(|address| match address {
            IpAddress::Ipv4(address) => Some(address),
            IpAddress::Ipv6(_) => None,
        })
        .ok_or_else(|| format!("lookup {host}: no IPv4 address"))?;
    let told = text(IpAddress::Ipv4(address));
    let socket = create_tcp_socket(IpAddressFamily::Ipv4).map_err(|error| format!("create: {error:?}"))?;
    let remote = IpSocketAddress::Ipv4(Ipv4SocketAddress { port, address });
    socket.start_connect(network, remote).map_err(|error| format!("connect {told}:{port}: {error:?}"))?;
    let (input, output) = loop {
        match socket.finish_connect() {
            Err(ErrorCode::WouldBlock) => socket.subscribe().block(),
            other => break other.map_err(|error| format!("connect {told}:{port}: {error:?}"))?,
        }
    };
    let sent = format!("{line}\n");
    output.blocking_write_and_flush(sent.as_bytes()).map_err(|error| format!("write: {error:?}"))?;
    let mut answer = Vec::new();
    while answer.len() < sent.len() {
        answer.extend(input.blocking_read(BLOCK).map_err(|error| format!("read: {error:?}"))?);
    }
    println!("{told} answered {}", String::from_utf8_lossy(&answer).trim_end());
    Ok(())
}
