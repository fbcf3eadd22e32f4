//! `agnhost`, the tests' own tool: its subcommands, those that serve in `servers`.

use std::fs;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::applets;
use crate::streams::{self, describe, Streams};

const INITIAL_CONTENT: &str = "mount-tester new file\n";
const SERVERS: [&str; 14] = [
    "audit-proxy", "dns", "fake-gitserver", "grpc-health-checking", "guestbook", "liveness", "netexec", "nettest",
    "port-forward-tester", "porter", "resource-consumer-controller", "serve-hostname", "test-webserver", "webhook",
];

pub fn main(argv: &[String], streams: &Streams) -> i32 {
    let command = argv.get(1).map_or("pause", String::as_str);
    let words = argv.get(2..).unwrap_or(&[]);
    match command {
        "pause" => {
            streams.say("Paused");
            streams::sleep_for_ever()
        }
        "etc-hosts" => applets::program(&["cat".to_string(), "/etc/hosts".to_string()], streams).unwrap_or(127),
        "entrypoint-tester" => streams.say(&format!("[{}]", argv.join(" "))),
        "mounttest" => mounttest(words, streams),
        "logs-generator" => logs_generator(words, streams),
        "help" | "--help" => streams.say("agnhost as a wasm module: pause, entrypoint-tester, mounttest, logs-generator"),
        #[cfg(feature = "network")]
        "connect" => crate::clients::connect(words, streams),
        _ if SERVERS.contains(&command) => {
            #[cfg(feature = "network")]
            if let Some(code) = crate::servers::run(command, words, streams) {
                return code;
            }
            streams.complain(&format!("{} is not among what the stand-in serves: it only runs", command));
            streams::sleep_for_ever()
        }
        _ => {
            streams.complain(&format!("Error: unknown command {:?} for \"agnhost\"", command));
            1
        }
    }
}

/// The value of `--name=value` or `--name value`.
pub fn flag<'a>(words: &'a [String], names: &[&str]) -> Option<&'a str> {
    words.iter().enumerate().find_map(|(index, word)| {
        let (name, value) = word.split_once('=').map_or((word.as_str(), None), |(name, value)| (name, Some(value)));
        let given = names.contains(&name);
        if given { value.or_else(|| words.get(index + 1).map(String::as_str)) } else { None }
    })
}

/// The checks in agnhost's order. What WASI does not tell (types of file systems, modes, owners) is said in place of the
/// words that a test of them looks for; it is no failure, as other tests only pass the flags.
fn mounttest(words: &[String], streams: &Streams) -> i32 {
    let mut failed = false;
    if let Some(path) = flag(words, &["--fs_type"]) {
        streams.say(&format!("mount type of {:?} is not known: a module has no statfs", path));
    }
    for name in ["--new_file_0644", "--new_file_0666", "--new_file_0660", "--new_file_0777"] {
        if let Some(path) = flag(words, &[name]) {
            failed |= match fs::write(path, INITIAL_CONTENT) {
                Ok(()) => !read_once(path, streams),
                Err(error) => {
                    streams.say(&format!("error writing new file {:?}: {}", path, describe(&error)));
                    true
                }
            };
        }
    }
    for name in ["--file_mode", "--file_perm", "--file_owner"] {
        if let Some(path) = flag(words, &[name]) {
            streams.say(&format!("{} of {:?} is not known: WASI's stat tells neither mode nor owner", name, path));
        }
    }
    if let Some(path) = flag(words, &["--file_content"]) {
        failed |= !read_once(path, streams);
    }
    if let Some(path) = flag(words, &["--file_content_in_loop"]) {
        let limit = flag(words, &["--retry_time"]).and_then(|text| text.parse().ok()).unwrap_or(180);
        let stops = flag(words, &["--break_on_expected_content"]) != Some("false");
        failed |= !read_in_loop(path, Duration::from_secs(limit), stops, streams);
    }
    i32::from(failed)
}

fn read_once(path: &str, streams: &Streams) -> bool {
    match fs::read(path) {
        Ok(data) => {
            streams.say(&format!("content of file {:?}: {}", path, String::from_utf8_lossy(&data)));
            true
        }
        Err(error) => {
            streams.say(&format!("error reading file content for {:?}: {}", path, describe(&error)));
            false
        }
    }
}

fn read_in_loop(path: &str, limit: Duration, stops: bool, streams: &Streams) -> bool {
    let started = Instant::now();
    let mut succeeded = true;
    while started.elapsed() < limit {
        match fs::read(path) {
            Ok(data) => {
                let text = String::from_utf8_lossy(&data).into_owned();
                streams.say(&format!("content of file {:?}: {}", path, text));
                succeeded = true;
                if stops && text == INITIAL_CONTENT {
                    return true;
                }
                if stops {
                    streams.say(&format!("Unexpected content. Expected: {}. Retrying", INITIAL_CONTENT));
                }
            }
            Err(error) => {
                streams.say(&format!("Error reading file {}: {}, retrying", path, describe(&error)));
                succeeded = false;
            }
        }
        thread::sleep(Duration::from_secs(2));
    }
    succeeded
}

/// Lines as an API server writes them, evenly over the given time, on stderr as klog does.
fn logs_generator(words: &[String], streams: &Streams) -> i32 {
    let total: u32 = flag(words, &["--log-lines-total", "-t"]).and_then(|text| text.parse().ok()).unwrap_or(0);
    let duration = flag(words, &["--run-duration", "-d"]).map_or("", |text| text);
    let seconds: f64 = match duration.strip_suffix('s').map(str::parse) {
        Some(Ok(seconds)) if total > 0 => seconds,
        _ => {
            streams.complain(&format!("Invalid number of lines or duration: {} {:?}", total, duration));
            return 255;
        }
    };
    let namespaces = ["kube-system", "default", "ns"];
    let mut random = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.subsec_nanos());
    let mut below = |limit: u32| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 8) % limit
    };
    for id in 0..total {
        let method = ["GET", "POST", "PUT"][below(3) as usize];
        let namespace = namespaces[below(3) as usize];
        let pod: String = (0..3 + below(2)).map(|_| (b'a' + below(26) as u8) as char).collect();
        let status = 200 + below(400);
        let pod_path = format!("/api/v1/namespaces/{}/pods/{}", namespace, pod);
        streams.complain(&format!("I0101 00:00:00.000000 1 logs_generator.go:76] {} {} {} {}", id, method, pod_path, status));
        thread::sleep(Duration::from_secs_f64(seconds / f64::from(total)));
    }
    0
}
