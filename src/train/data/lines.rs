//! The lines of a file, read one at a time.
//!
//! Owns the bounds of a line and of their number. Never looks into a line. The thing to know: a
//! line that is too long is read over, not held.

use std::io::{self, BufRead};

/// A line that is not blank, or why it cannot be one.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// Without its end.
    Text(&'a str),
    /// So many bytes long.
    TooLong(u64),
    /// From this byte on, counted from 1.
    NotUtf8(usize),
    /// More lines than may be; nothing follows.
    TooMany,
}

/// See the file's head.
pub struct Lines<R> {
    from: R,
    bytes_max: usize,
    lines_max: u64,
    number: u64,
    line: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    pub fn new(from: R, bytes_max: usize, lines_max: u64) -> Self {
        Self { from, bytes_max, lines_max, number: 0, line: Vec::new() }
    }

    /// The next line that is not blank, with its number from 1.
    pub fn next(&mut self) -> io::Result<Option<(u64, Line<'_>)>> {
        loop {
            let Some(length) = self.read()? else { return Ok(None) };
            self.number += 1;
            if self.number > self.lines_max {
                return Ok(Some((self.number, Line::TooMany)));
            }
            if length > self.bytes_max as u64 {
                return Ok(Some((self.number, Line::TooLong(length))));
            }
            if !self.line.trim_ascii().is_empty() {
                break;
            }
        }
        let line = std::str::from_utf8(&self.line)
            .map_or_else(|e| Line::NotUtf8(e.valid_up_to() + 1), Line::Text);
        Ok(Some((self.number, line)))
    }

    /// Bytes of the next line, which `line` then holds if there are at most `bytes_max`.
    fn read(&mut self) -> io::Result<Option<u64>> {
        self.line.clear();
        // A byte order mark and a carriage return are not of the line.
        let most = self.bytes_max + "\u{FEFF}\r".len();
        let (mut length, mut ended) = (0, false);
        while !ended {
            let bytes = match self.from.fill_buf() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                bytes => bytes?,
            };
            if bytes.is_empty() {
                break;
            }
            let end = bytes.iter().position(|b| *b == b'\n');
            let part = &bytes[..end.unwrap_or(bytes.len())];
            ended = end.is_some();
            let room = most.saturating_sub(self.line.len());
            self.line.extend_from_slice(&part[..part.len().min(room)]);
            length += part.len() as u64;
            let read = part.len() + usize::from(ended);
            self.from.consume(read);
        }
        if !ended && length == 0 {
            return Ok(None);
        }
        if self.number == 0 && self.line.starts_with("\u{FEFF}".as_bytes()) {
            self.line.drain(..3);
            length -= 3;
        }
        if length == self.line.len() as u64 && self.line.last() == Some(&b'\r') {
            self.line.pop();
            length -= 1;
        }
        Ok(Some(length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufReader, Read};

    fn all(bytes: &[u8], bytes_max: usize, lines_max: u64) -> Vec<String> {
        // A buffer of 3 bytes: every border falls somewhere.
        let mut lines = Lines::new(BufReader::with_capacity(3, bytes), bytes_max, lines_max);
        let mut seen = Vec::new();
        while let Some((number, line)) = lines.next().unwrap() {
            seen.push(format!("{number} {line:?}"));
            if line == Line::TooMany {
                break;
            }
        }
        seen
    }

    #[test]
    fn marks_and_ends_are_no_part_of_a_line_and_blank_lines_are_counted_only() {
        let bytes = "\u{FEFF}one\r\n\n \t\r\nünf\n\nlast".as_bytes();
        assert_eq!(all(bytes, 9, 9), [r#"1 Text("one")"#, r#"4 Text("ünf")"#, r#"6 Text("last")"#]);
        assert!(all("\u{FEFF}\r\n\n".as_bytes(), 9, 9).is_empty());
        assert!(all(b"", 9, 9).is_empty());
    }

    #[test]
    fn a_line_that_is_too_long_or_no_text_is_told_and_the_next_one_read() {
        assert_eq!(
            all(b"12345\n1234\r\n\xFF\nx", 4, 9),
            ["1 TooLong(5)", r#"2 Text("1234")"#, "3 NotUtf8(1)", r#"4 Text("x")"#]
        );
        assert_eq!(all(b"a\n\nb\nc", 4, 2), [r#"1 Text("a")"#, "3 TooMany"]);
    }

    #[test]
    fn a_line_without_end_is_not_held() {
        let endless = BufReader::new(io::repeat(b'x').take(64 << 20));
        let mut lines = Lines::new(endless, 1 << 10, 9);
        assert_eq!(lines.next().unwrap(), Some((1, Line::TooLong(64 << 20))));
        assert!(lines.line.capacity() < 4 << 10, "{}", lines.line.capacity());
        assert_eq!(lines.next().unwrap(), None);
    }
}
