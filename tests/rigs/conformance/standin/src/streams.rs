//! Where a command reads and writes. There is one process, so pipes and `$(...)` are buffers.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::rc::Rc;
use std::thread;
use std::time::Duration;

#[derive(Clone)]
pub enum Sink {
    Stdout,
    Stderr,
    Nowhere,
    File(Rc<File>),
    Buffer(Rc<RefCell<Vec<u8>>>),
}

impl Sink {
    pub fn write(&self, data: &[u8]) -> bool {
        match self {
            Sink::Stdout => io::stdout().write_all(data).and_then(|_| io::stdout().flush()).is_ok(),
            Sink::Stderr => io::stderr().write_all(data).is_ok(),
            Sink::Nowhere => true,
            Sink::File(file) => file.as_ref().write_all(data).is_ok(),
            Sink::Buffer(buffer) => {
                buffer.borrow_mut().extend_from_slice(data);
                true
            }
        }
    }
}

#[derive(Clone)]
pub struct Streams {
    pub input: Option<Rc<Vec<u8>>>,
    pub out: Sink,
    pub err: Sink,
}

impl Streams {
    pub fn real() -> Streams {
        Streams { input: None, out: Sink::Stdout, err: Sink::Stderr }
    }

    /// All of the input: of the real one until its end.
    pub fn read(&self) -> Vec<u8> {
        match &self.input {
            Some(data) => data.to_vec(),
            None => {
                let mut data = Vec::new();
                let _ = io::stdin().read_to_end(&mut data);
                data
            }
        }
    }

    pub fn say(&self, text: &str) -> i32 {
        i32::from(!self.out.write(format!("{}\n", text).as_bytes()))
    }

    pub fn complain(&self, text: &str) {
        self.err.write(format!("{}\n", text).as_bytes());
    }

    /// 0, or 1 with the reason on stderr.
    pub fn report(&self, who: &str, what: &str, result: io::Result<()>) -> i32 {
        match result {
            Ok(()) => 0,
            Err(error) => {
                self.complain(&format!("{}: {}: {}", who, what, describe(&error)));
                1
            }
        }
    }
}

/// An error in the C library's words, which tests look for; the standard library adds the number.
pub fn describe(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_string()
}

pub fn sleep_for_ever() -> ! {
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

/// The end, with this code: a component tells it by a call of its own, since preview 1's knows only 0 and 1 there.
pub fn leave(code: i32) -> ! {
    #[cfg(feature = "network")]
    wasip2::cli::exit::exit_with_code(code as u8);
    std::process::exit(code)
}
