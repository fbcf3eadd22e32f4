//! What the supervisor hears of this process: JSON lines on a pipe of its own, because a wait status cannot tell a trap
//! from an exit with 134.
//!
//! `{"started": true}` once guest code is about to run (or a server listens), then one of `{"exit": code}`,
//! `{"trap": text}` and `{"error": text, "artifact": bool}`. `sandbox.py` writes the same lines for modules.

use crate::ffi;
use serde_json::json;
use std::fmt::Display;

/// 128 + SIGABRT: what the wasmtime command answers for a trap.
const TRAP_EXIT_CODE: i32 = 134;
/// What never ran.
pub const START_ERROR_EXIT_CODE: i32 = 128;
/// A backtrace can be long; a pipe that no one reads for a while takes 64 KiB.
const MAX_TEXT_BYTES: usize = 12 * 1024;

/// How it ended.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// The guest's own code, 0 to 255.
    Exit(i32),
    /// The guest failed; wasmtime's text with its backtrace.
    Trap(String),
    /// It could not be started. `artifact`: the precompiled file itself is bad and should be compiled again.
    Error { text: String, artifact: bool },
}

impl Outcome {
    /// A start that failed for a reason outside the precompiled file.
    pub fn start_error(reason: impl Display) -> Self {
        Outcome::Error {
            text: reason.to_string(),
            artifact: false,
        }
    }
}

/// The write end of the pipe; -1: no one listens.
pub struct Report {
    descriptor: i32,
}

impl Report {
    /// Takes the descriptor as it is: it stays open until the process ends.
    pub fn new(descriptor: i32) -> Self {
        Report { descriptor }
    }

    /// The container counts as running from here.
    pub fn started(&self) {
        self.write(json!({"started": true}));
    }

    /// The last line, and the exit code that goes with it.
    pub fn end(&self, outcome: Outcome) -> i32 {
        match outcome {
            Outcome::Exit(code) => {
                self.write(json!({"exit": code & 0xff}));
                code & 0xff
            }
            Outcome::Trap(text) => {
                self.write(json!({"trap": cut(&text)}));
                TRAP_EXIT_CODE
            }
            Outcome::Error { text, artifact } => {
                self.write(json!({"error": cut(&text), "artifact": artifact}));
                START_ERROR_EXIT_CODE
            }
        }
    }

    fn write(&self, line: serde_json::Value) {
        let mut text = line.to_string();
        text.push('\n');
        // A supervisor that is gone needs no report.
        let _ = ffi::write(self.descriptor, text.as_bytes());
    }
}

/// At most `MAX_TEXT_BYTES`, whole characters.
fn cut(text: &str) -> String {
    let text = text.trim();
    if text.len() <= MAX_TEXT_BYTES {
        return text.to_owned();
    }
    let mut end = MAX_TEXT_BYTES;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}...", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let text = "ü".repeat(MAX_TEXT_BYTES);
        let short = cut(&text);
        assert!(short.len() <= MAX_TEXT_BYTES + 3);
        assert!(short.ends_with("ü..."));
    }

    #[test]
    fn each_outcome_has_its_exit_code() {
        let report = Report::new(-1);
        assert_eq!(report.end(Outcome::Exit(300)), 44);
        assert_eq!(report.end(Outcome::Trap("x".into())), 134);
        assert_eq!(report.end(Outcome::start_error("x")), 128);
    }
}
