//! Says hello, waits, and says it again, for ever. `INTERVAL_SECONDS` (default 5, fractions allowed) is the wait.

use std::env;
use std::io::{self, Write};
use std::process;
use std::thread::sleep;
use std::time::Duration;

const DEFAULT_SECONDS: f64 = 5.0;

fn interval() -> Result<Duration, String> {
    let text = match env::var("INTERVAL_SECONDS") {
        Ok(text) => text,
        Err(_) => return Ok(Duration::from_secs_f64(DEFAULT_SECONDS)),
    };
    match text.parse::<f64>() {
        Ok(seconds) if (0.001..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(format!("INTERVAL_SECONDS must be a number from 0.001 to 86400, not {:?}", text)),
    }
}

fn main() -> io::Result<()> {
    let interval = interval().unwrap_or_else(|message| {
        eprintln!("{}", message);
        process::exit(2)
    });
    let mut stdout = io::stdout();
    loop {
        writeln!(stdout, "Hello, from WASI and Krustlet!")?;
        stdout.flush()?;
        sleep(interval);
    }
}
