//! The port of an open server and of one with keys: connections, hosts, origins, log lines.

mod connections;
mod lines;
mod pages;
mod unread;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use support::live::{Live, PATIENCE};
use tokio::net::TcpSocket;

/// Where a server listens.
fn address(live: &Live) -> SocketAddr {
    live.server.url.strip_prefix("http://").expect("http").parse().expect("an address")
}

/// A connection of one of loopback's many addresses.
async fn connect_from(live: &Live, last: u8) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((Ipv4Addr::new(127, 0, 0, last), 0)))?;
    let stream = socket.connect(address(live)).await?.into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn connect(live: &Live) -> TcpStream {
    let stream = TcpStream::connect(address(live)).expect("connected");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

/// What comes until the server closes; an error of the connection is named at its end.
fn until_closed(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let ended = stream.read_to_end(&mut bytes);
    let mut text = String::from_utf8_lossy(&bytes).into_owned();
    if let Err(e) = ended {
        let what = if e.kind() == ErrorKind::WouldBlock { "still open" } else { "reset" };
        text += &format!("<{what}>");
    }
    text
}

/// One request on a connection of its own, as bytes, and its whole answer.
fn exchange(live: &Live, request: &[u8]) -> String {
    let mut stream = connect(live);
    stream.write_all(request).expect("sent");
    until_closed(&mut stream)
}

/// The bytes of a request; `connection: close` among its headers.
fn request(line: &str, host: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = match body.is_empty() {
        true => String::new(),
        false => format!("Content-Length: {}\r\n", body.len()),
    };
    format!("{line} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}{length}\r\n{body}")
        .into_bytes()
}

/// The status of an answer, and its error's code where it has one.
fn outcome(answer: &str) -> String {
    let status = answer.split(' ').nth(1).unwrap_or("none");
    let code = answer.split("\"code\":\"").nth(1).and_then(|rest| rest.split('"').next());
    code.map_or(status.to_owned(), |code| format!("{status} {code}"))
}

/// The value of a header; empty if there is none.
fn header<'a>(answer: &'a str, name: &str) -> &'a str {
    let head = answer.split("\r\n\r\n").next().unwrap_or_default();
    let of = |line: &'a str| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    };
    head.split("\r\n").find_map(of).unwrap_or_default()
}
