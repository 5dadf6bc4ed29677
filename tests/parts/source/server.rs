//! An HTTP server of files that can drop connections.
//!
//! Owns one port of the loopback and its log of requests. Knows no model. The thing to know: every
//! answer closes its connection.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// A file server with Range, that ends the first `drops` answers after `drop_after` bytes of their
/// body.
pub struct Server {
    pub address: String,
    state: Arc<State>,
}

struct State {
    files: Files,
    drop_after: usize,
    drops: Mutex<usize>,
    ranges: bool,
    requests: Mutex<Vec<(String, Option<String>)>>,
}

/// Body and headers by path.
pub type Files = HashMap<String, (Vec<u8>, Headers)>;
pub type Headers = Vec<(String, String)>;

impl Server {
    /// `drops`: how many answers end early. `ranges`: whether Range is honoured.
    pub fn start(files: Files, drops: usize, drop_after: usize, ranges: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let state = Arc::new(State {
            files,
            drop_after,
            drops: Mutex::new(drops),
            ranges,
            requests: Mutex::default(),
        });
        let address = format!("http://{}", listener.local_addr().unwrap());
        let shared = state.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                let state = shared.clone();
                std::thread::spawn(move || answer(connection.unwrap(), &state));
            }
        });
        Self { address, state }
    }

    /// Of each request so far: path, and Range where there was one.
    pub fn requests(&self) -> Vec<(String, Option<String>)> {
        self.state.requests.lock().unwrap().clone()
    }
}

fn answer(mut connection: TcpStream, state: &State) -> Option<()> {
    let mut lines = BufReader::new(connection.try_clone().ok()?).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let mut range = None;
    while let Some(Ok(line)) = lines.next().filter(|l| l.as_ref().is_ok_and(|l| !l.is_empty())) {
        let (name, value) = line.split_once(':')?;
        if name.eq_ignore_ascii_case("range") {
            range = Some(value.trim().to_owned());
        }
    }
    state.requests.lock().unwrap().push((path.clone(), range.clone()));
    let Some((body, headers)) = state.files.get(&path) else {
        return write!(
            connection,
            "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        )
        .ok();
    };
    let headers: String = headers.iter().map(|(n, v)| format!("{n}: {v}\r\n")).collect();
    let total = body.len();
    let (first, last) = match range.filter(|_| state.ranges) {
        None => (0, None),
        Some(range) => {
            let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
            (first.parse().ok()?, Some(last.parse().unwrap_or(total - 1)))
        }
    };
    if first >= total {
        let head = format!(
            "HTTP/1.1 416 No\r\ncontent-range: bytes */{total}\r\n\
             content-length: 0\r\nconnection: close\r\n\r\n"
        );
        return connection.write_all(head.as_bytes()).ok();
    }
    let body = &body[first..=last.unwrap_or(total - 1)];
    let status = match last {
        None => "HTTP/1.1 200 OK\r\n".to_owned(),
        Some(last) => {
            format!("HTTP/1.1 206 Partial\r\ncontent-range: bytes {first}-{last}/{total}\r\n")
        }
    };
    let head =
        format!("{status}{headers}content-length: {}\r\nconnection: close\r\n\r\n", body.len());
    connection.write_all(head.as_bytes()).ok()?;
    let mut drops = state.drops.lock().unwrap();
    let sent = match *drops > 0 && body.len() > state.drop_after {
        true => {
            *drops -= 1;
            &body[..state.drop_after]
        }
        false => body,
    };
    connection.write_all(sent).ok()
}
