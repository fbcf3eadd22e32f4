//! Shows what a pod gets from a ConfigMap: variables of the environment, and files in a volume.
//!
//! Prints every variable whose name begins with `APP_`, then every file in `CONFIG_DIR` (default `/etc/config`), and
//! from then on each file whose content changes, which it looks for every `INTERVAL_SECONDS` (default 1).

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;
use std::{env, fs, process};

type Files = BTreeMap<String, String>;

fn read_files(folder: &Path) -> io::Result<Files> {
    let mut files = Files::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // A ConfigMap volume keeps its versions in folders whose names begin with two dots.
        if name.starts_with("..") {
            continue;
        }
        let content = fs::read(entry.path())?;
        files.insert(name, String::from_utf8_lossy(&content).trim_end().to_string());
    }
    Ok(files)
}

fn interval() -> Duration {
    let seconds = env::var("INTERVAL_SECONDS").ok().and_then(|text| text.parse::<f64>().ok());
    Duration::from_secs_f64(seconds.unwrap_or(1.0).clamp(0.01, 3600.0))
}

fn main() -> io::Result<()> {
    let mut variables: Vec<(String, String)> = env::vars().filter(|(name, _)| name.starts_with("APP_")).collect();
    variables.sort();
    let mut stdout = io::stdout();
    for (name, value) in variables {
        writeln!(stdout, "variable {}={}", name, value)?;
    }

    let folder = env::var("CONFIG_DIR").unwrap_or_else(|_| "/etc/config".to_string());
    let folder = Path::new(&folder);
    let mut known = Files::new();
    loop {
        match read_files(folder) {
            Ok(files) => {
                for (name, content) in &files {
                    match known.get(name) {
                        None => writeln!(stdout, "file {}: {}", name, content)?,
                        Some(before) if before != content => writeln!(stdout, "file {} is now: {}", name, content)?,
                        Some(_) => {}
                    }
                }
                known = files;
            }
            // In the instant in which an update swaps the folders, a look may fail; only the first one must succeed.
            Err(error) if known.is_empty() => {
                eprintln!("{} cannot be read: {}", folder.display(), error);
                process::exit(2);
            }
            Err(_) => {}
        }
        stdout.flush()?;
        sleep(interval());
    }
}
