//! The book: a file with a line per entry.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};

pub const MAX_ENTRY_BYTES: usize = 1000;

fn path() -> String {
    std::env::var("BOOK").unwrap_or_else(|_| "/data/book.txt".to_string())
}

/// All entries, the oldest first; none while there is no file yet.
pub fn entries() -> io::Result<Vec<String>> {
    match fs::read_to_string(path()) {
        Ok(text) => Ok(text.lines().map(str::to_string).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Append an entry; false when it is not one line of text.
pub fn add(entry: &str) -> io::Result<bool> {
    let entry = entry.trim();
    if entry.is_empty() || entry.chars().any(char::is_control) {
        return Ok(false);
    }
    // One write per entry: instances that append at the same time do not mix their lines.
    let mut file = OpenOptions::new().create(true).append(true).open(path())?;
    file.write_all(format!("{entry}\n").as_bytes())?;
    Ok(true)
}
