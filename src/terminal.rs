//! Text from outside, made harmless before it reaches a log or a terminal.
//!
//! Owns which characters those are. Never decides what is shown. The thing to know: a character
//! that moves a cursor, begins a line or turns the order of others around is written as an escape,
//! and what is too long is cut while it is written, so that it is never made whole.

use std::fmt::{self, Write};
use std::io::Write as _;

/// A writer that escapes, and ends after so many characters.
pub struct Plain<'a> {
    to: &'a mut dyn Write,
    left: usize,
    /// For a terminal: lines and tabs pass, and marks of direction, which its languages need.
    lines: bool,
    cut: bool,
}

impl<'a> Plain<'a> {
    pub fn new(to: &'a mut dyn Write, chars_max: usize) -> Self {
        Self { to, left: chars_max, lines: false, cut: false }
    }

    /// Writes a value, or as much of it as fits and a mark.
    pub fn show(mut self, value: fmt::Arguments<'_>) -> fmt::Result {
        match self.write_fmt(value) {
            // Our own way to say that it is enough.
            Err(_) if self.cut => self.to.write_char('…'),
            done => done,
        }
    }
}

impl Write for Plain<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            if self.left == 0 {
                self.cut = true;
                return Err(fmt::Error);
            }
            self.left -= 1;
            let passes = match self.lines {
                true => !c.is_control() || c == '\n' || c == '\t',
                false => is_harmless(c),
            };
            match passes {
                true => self.to.write_char(c)?,
                false => write!(self.to, "{}", c.escape_default())?,
            }
        }
        Ok(())
    }
}

/// Whether a character only shows itself: no control character, no separator of lines, nothing that
/// changes the direction of others.
pub fn is_harmless(c: char) -> bool {
    let turns = ['\u{61c}', '\u{200e}', '\u{200f}', '\u{2028}', '\u{2029}'];
    let bidi = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !c.is_control() && !bidi && !turns.contains(&c)
}

/// `text` for a terminal: nothing in it can move the cursor elsewhere or set anything.
pub fn on_terminal(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut out = Plain { to: &mut shown, left: usize::MAX, lines: true, cut: false };
    let _ = out.write_str(text); // a String takes everything
    shown
}

/// Prints at once. A reader who has gone away (`| head`) is no failure.
pub fn say(text: &str) {
    let mut out = std::io::stdout();
    let text = on_terminal(text);
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str, max: usize) -> String {
        let mut line = String::new();
        Plain::new(&mut line, max).show(format_args!("{text}")).expect("a String takes it");
        line
    }

    #[test]
    fn what_could_forge_a_line_or_drive_a_terminal_is_escaped() {
        let odd = "a\nb\rc\u{1b}[2Jd\u{85}\u{2028}\u{202e}e\u{9b}\0\u{7f}";
        let expected = "a\\nb\\rc\\u{1b}[2Jd\\u{85}\\u{2028}\\u{202e}e\\u{9b}\\u{0}\\u{7f}";
        assert_eq!(shown(odd, 100), expected);
        assert_eq!(shown("grün 日本 🚲 עברית \"x\"", 100), "grün 日本 🚲 עברית \"x\"");
        assert_eq!(on_terminal("a\n\tb\u{1b}]0;x\u{7}"), "a\n\tb\\u{1b}]0;x\\u{7}");
    }

    #[test]
    fn what_is_too_long_is_cut_and_not_made() {
        struct Endless;
        impl fmt::Display for Endless {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                loop {
                    f.write_str("lorem ipsum ")?;
                }
            }
        }
        let mut line = String::new();
        Plain::new(&mut line, 20).show(format_args!("{Endless}")).expect("cut");
        assert_eq!(line, "lorem ipsum lorem ip…");
        assert_eq!(shown("exactly", 7), "exactly");
    }
}
