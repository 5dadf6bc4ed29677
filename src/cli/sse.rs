//! Server-sent events, read as they arrive.
//!
//! Owns the framing: bytes in, whole events out. Never looks into the data. The thing to know: a
//! chunk of the network ends anywhere, also inside a character.

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SseEvent {
    /// `message` unless the server named it.
    pub name: String,
    pub data: String,
}

/// The bytes of an event that is not whole yet.
#[derive(Default)]
pub struct SseReader {
    pending: Vec<u8>,
    name: String,
    data: Vec<String>,
}

impl SseReader {
    /// Events that became whole with these bytes.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<SseEvent> {
        self.pending.extend_from_slice(bytes);
        let mut events = Vec::new();
        let mut from = 0;
        while let Some(n) = self.pending[from..].iter().position(|b| *b == b'\n') {
            let line = String::from_utf8_lossy(&self.pending[from..from + n]).into_owned();
            from += n + 1;
            events.extend(self.line(line.trim_end_matches('\r')));
        }
        self.pending.drain(..from);
        events
    }

    fn line(&mut self, line: &str) -> Option<SseEvent> {
        if line.is_empty() {
            let name = std::mem::take(&mut self.name);
            let data = std::mem::take(&mut self.data);
            let name = if name.is_empty() { "message".to_owned() } else { name };
            return (!data.is_empty()).then(|| SseEvent { name, data: data.join("\n") });
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => self.data.push(value.to_owned()),
            "event" => self.name = value.to_owned(),
            _ => {} // comments, ids and retry times
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        let page = "data: {\"a\":\"ü\"}\n\n: ping\n\nevent: error\r\ndata: x\r\ndata: y\r\n\r\n\
                    data:[DONE]\n\n";
        let whole = SseReader::default().push(page.as_bytes());
        let said: Vec<(&str, &str)> =
            whole.iter().map(|e| (e.name.as_str(), e.data.as_str())).collect();
        assert_eq!(said, [("message", "{\"a\":\"ü\"}"), ("error", "x\ny"), ("message", "[DONE]")]);
        for cut in 1..page.len() {
            let mut reader = SseReader::default();
            let mut events = reader.push(&page.as_bytes()[..cut]);
            events.extend(reader.push(&page.as_bytes()[cut..]));
            assert_eq!(events, whole, "cut at byte {cut}");
        }
    }
}
