//! Tries what programs try, and reports what the sandbox lets through: `allowed: ...` or `refused: ...` a line.
//!
//! `/data` is a folder that the pod gives it, to read and write; `/readonly` one to read. All else of the machine is not
//! merely forbidden: there is no name for it. Exits with 1 when anything is not as it should be.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{self, Command};
use std::time::{Instant, SystemTime};
use std::{env, thread};

struct Tour {
    surprises: u32,
}

impl Tour {
    fn visit<T>(&mut self, what: &str, allowed: bool, result: io::Result<T>) {
        let line = match &result {
            Ok(_) => format!("allowed: {}", what),
            Err(error) => format!("refused: {} ({})", what, error),
        };
        println!("{}", line);
        if result.is_ok() != allowed {
            println!("surprise: {} should have been {}", what, if allowed { "allowed" } else { "refused" });
            self.surprises += 1;
        }
    }
}

fn random_bytes() -> io::Result<()> {
    // A HashMap's keys come from the host's random_get.
    use std::collections::hash_map::RandomState;
    use std::hash::{BuildHasher, Hasher};
    let (one, two) = (RandomState::new(), RandomState::new());
    match one.build_hasher().finish() == two.build_hasher().finish() {
        false => Ok(()),
        true => Err(io::Error::new(io::ErrorKind::Other, "twice the same")),
    }
}

/// Every process of a cluster that Wasilet stands up, and of `./run`, carries a variable of this name.
fn foreign_variable() -> io::Result<String> {
    let found = env::vars().map(|(name, _)| name).find(|name| name.starts_with("WASILET_"));
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is none"))
}

fn main() {
    let mut tour = Tour { surprises: 0 };

    tour.visit("write a file in the folder that was given", true, fs::write("/data/note.txt", "meow"));
    tour.visit("read it back", true, fs::read("/data/note.txt"));
    tour.visit("remove it", true, fs::remove_file("/data/note.txt"));
    tour.visit("read a file in a folder given for reading", true, fs::read("/readonly/greeting"));
    tour.visit("write there", false, fs::write("/readonly/note.txt", "meow"));
    tour.visit(
        "change a file there",
        false,
        OpenOptions::new().append(true).open("/readonly/greeting").and_then(|mut file| file.write_all(b"meow")),
    );

    tour.visit("list the machine's programs", false, fs::read_dir("/usr/bin"));
    tour.visit("read the machine's password file", false, File::open("/etc/passwd"));
    tour.visit("leave the given folder upwards", false, File::open("/data/../etc/passwd"));
    tour.visit("leave it by many steps", false, File::open("/data/../../../../../../etc/passwd"));
    tour.visit("read of other processes", false, fs::read_dir("/proc"));
    tour.visit("read the node's own files", false, File::open("/var/lib/kubelet/config.yaml"));

    tour.visit("start a program", false, Command::new("/bin/sh").spawn());
    tour.visit("listen on a port", false, TcpListener::bind("127.0.0.1:8080"));
    tour.visit("open a connection", false, TcpStream::connect("127.0.0.1:80"));
    tour.visit("start a thread", false, thread::Builder::new().spawn(|| ()));

    tour.visit("ask for the time", true, SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_err(|_| io::ErrorKind::Other.into()));
    tour.visit("measure time", true, { let _ = Instant::now().elapsed(); Ok(()) });
    tour.visit("have random numbers", true, random_bytes());
    tour.visit("read its own environment", true, env::var("POD_NAME").map_err(|_| io::ErrorKind::NotFound.into()));
    tour.visit("see the environment of the node's own processes", false, foreign_variable());

    println!("surprises: {}", tour.surprises);
    process::exit(if tour.surprises == 0 { 0 } else { 1 });
}
