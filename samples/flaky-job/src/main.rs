//! Fails as often as it is told to, then succeeds: what a Job's retries are for.
//!
//! `FAILURES` (default 1) is how many attempts fail. How many there were is kept in `STATE_DIR` (default `/state`), a
//! volume that outlives the container but not the pod.

use std::io;
use std::path::Path;
use std::{env, fs, process};

fn main() -> io::Result<()> {
    let failures: u32 = match env::var("FAILURES").unwrap_or_else(|_| "1".to_string()).parse() {
        Ok(number) => number,
        Err(_) => {
            eprintln!("FAILURES must be a number");
            process::exit(2);
        }
    };
    let folder = env::var("STATE_DIR").unwrap_or_else(|_| "/state".to_string());
    let file = Path::new(&folder).join("attempts");
    let attempt = match fs::read_to_string(&file) {
        Ok(text) => text.trim().parse::<u32>().unwrap_or(0) + 1,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 1,
        Err(error) => return Err(error),
    };
    fs::write(&file, attempt.to_string())?;

    if attempt <= failures {
        println!("attempt {}: failed, as asked", attempt);
        process::exit(1);
    }
    println!("attempt {}: done", attempt);
    Ok(())
}
