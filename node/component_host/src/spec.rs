//! What Python asks for: one JSON text, read strictly.
//!
//! The text holds what a pod's author wrote (arguments, environment, paths), so every value is checked here once, and
//! the rest of the crate trusts it. A field that this version does not know is an error: library and Python side come
//! from the same source, and a field that is ignored would be a limit that is not kept.

use crate::policy::Cidr;
use serde::Deserialize;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// The whole text. Python has limits of its own per string (those of `execve`).
const MAX_TEXT_BYTES: usize = 8 * 1024 * 1024;

/// One component and how it runs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// [`crate::ABI_VERSION`] of the writer.
    pub version: u32,
    /// The precompiled file.
    pub artifact: PathBuf,
    /// The write end of the report pipe.
    pub report: i32,
    /// What it is.
    pub role: Role,
    /// Program name first.
    #[serde(default)]
    pub argv: Vec<String>,
    /// Names and values.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Preopened folders.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// Whether the guest reads descriptor 0.
    #[serde(default)]
    pub stdin: bool,
    /// How far one linear memory may grow.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// `wasi:sockets`; absent: none.
    #[serde(default)]
    pub sockets: Option<Sockets>,
    /// Outgoing `wasi:http`; absent: every request is denied.
    #[serde(default)]
    pub outgoing: Option<Outgoing>,
}

/// Which life it leads.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// `wasi:cli/run`, once.
    Command,
    /// `wasi:http/incoming-handler` (0.2) or `wasi:http/handler` (0.3), until it is told to end.
    Server(Server),
}

/// One preopened folder.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// A path, or `/proc/self/fd/N`.
    pub host: PathBuf,
    /// The name that the guest sees.
    pub guest: String,
    /// No writes.
    #[serde(default)]
    pub read_only: bool,
}

/// What `wasi:sockets` may do.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sockets {
    /// Bind and listen.
    pub listen: bool,
    /// Connect and send, but never to `deny`.
    pub connect: bool,
    /// Destinations that are refused.
    #[serde(default)]
    pub deny: Vec<Cidr>,
}

/// What outgoing `wasi:http` may do.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outgoing {
    /// `scheme://host[:port]` of the pod's list; nothing else is reached.
    pub origins: Vec<String>,
    /// Origins that the node's operator allows whatever they lead to.
    #[serde(default)]
    pub local_origins: Vec<String>,
    /// The node's own, which no origin leads to.
    #[serde(default)]
    pub own_addresses: Vec<IpAddr>,
    /// The cluster's API server: names or addresses, and ports.
    #[serde(default)]
    pub api_servers: Vec<(String, u16)>,
    /// Refused on every address: kubelets'.
    #[serde(default)]
    pub ports: Vec<u16>,
    /// Addresses that are refused whatever name led to them.
    #[serde(default)]
    pub deny: Vec<Cidr>,
    /// At the same time, per container.
    pub max_concurrent: u32,
    /// Until a connection stands, TLS included.
    pub connect_timeout_ms: u64,
    /// Until the head of the answer is there.
    pub request_timeout_ms: u64,
    /// Between two pieces of the answer.
    pub idle_timeout_ms: u64,
    /// Of one request.
    pub max_request_bytes: u64,
    /// Of one answer.
    pub max_response_bytes: u64,
    /// A PEM file with the certificates that are trusted.
    #[serde(default)]
    pub roots: Option<PathBuf>,
}

/// How a server behaves.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// A listening TCP socket.
    pub listener: i32,
    /// A file to map and count in; -1: counts are kept in this process alone.
    pub counters: i32,
    /// Requests that one instance answers; absent: 1 for WASI 0.2 and 128 for 0.3.
    #[serde(default)]
    pub reuse: Option<u32>,
    /// Requests at the same time.
    pub max_concurrent: u32,
    /// Connections at the same time.
    pub max_connections: u32,
    /// From a request's head to the head of its answer.
    pub request_timeout_ms: u64,
    /// Between two pieces of a body; of a connection without a request, too.
    pub idle_timeout_ms: u64,
    /// From a request's first byte to the end of its head.
    pub header_timeout_ms: u64,
    /// Of the head of a request.
    pub max_header_bytes: u32,
    /// Of the body of a request.
    pub max_body_bytes: u64,
    /// Length of an epoch: how long a guest computes before others have their turn.
    pub epoch_ms: u64,
    /// After the signal to end, connections are taken for this long at most, and only while some come.
    pub linger_ms: u64,
}

impl Spec {
    /// Read and check. The message of an error is for a person.
    pub fn parse(text: &[u8]) -> Result<Spec, String> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(format!("it has {} bytes, {MAX_TEXT_BYTES} fit", text.len()));
        }
        let spec: Spec = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if spec.version != crate::ABI_VERSION {
            let ours = crate::ABI_VERSION;
            return Err(format!("it is of version {}, this library reads {ours}", spec.version));
        }
        let strings = spec
            .argv
            .iter()
            .chain(spec.env.iter().flat_map(|(name, value)| [name, value]));
        if strings.into_iter().any(|text| text.contains('\0')) {
            return Err("an argument or environment variable contains a NUL byte".into());
        }
        if let Role::Server(server) = &spec.role {
            server.check()?;
        }
        Ok(spec)
    }
}

impl Server {
    fn check(&self) -> Result<(), String> {
        let counts = [
            ("max_concurrent", u64::from(self.max_concurrent), 10_000),
            ("max_connections", u64::from(self.max_connections), 100_000),
            ("reuse", u64::from(self.reuse.unwrap_or(1)), 1_000_000),
            ("max_header_bytes", u64::from(self.max_header_bytes), 1 << 20),
            ("request_timeout_ms", self.request_timeout_ms, 86_400_000),
            ("idle_timeout_ms", self.idle_timeout_ms, 86_400_000),
            ("header_timeout_ms", self.header_timeout_ms, 86_400_000),
            ("epoch_ms", self.epoch_ms, 10_000),
        ];
        for (name, value, most) in counts {
            if value == 0 || value > most {
                return Err(format!("{name} is {value}; 1 to {most} are possible"));
            }
        }
        Ok(())
    }

    /// See the field.
    pub fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.request_timeout_ms)
    }

    /// See the field.
    pub fn idle_timeout(&self) -> Duration {
        Duration::from_millis(self.idle_timeout_ms)
    }

    /// See the field.
    pub fn header_timeout(&self) -> Duration {
        Duration::from_millis(self.header_timeout_ms)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A server's settings for tests.
    pub fn server() -> Server {
        Server {
            listener: -1,
            counters: -1,
            reuse: None,
            max_concurrent: 4,
            max_connections: 8,
            request_timeout_ms: 1000,
            idle_timeout_ms: 1000,
            header_timeout_ms: 1000,
            max_header_bytes: 32768,
            max_body_bytes: 1 << 20,
            epoch_ms: 10,
            linger_ms: 0,
        }
    }

    const COMMAND: &str = r#"{"version": 1, "artifact": "/a", "report": 3, "role": "command""#;

    #[test]
    fn a_command_needs_little() {
        let spec = Spec::parse(format!("{COMMAND}}}").as_bytes()).unwrap();
        assert!(matches!(spec.role, Role::Command));
        assert!(spec.sockets.is_none() && spec.outgoing.is_none() && !spec.stdin);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_a_reason() {
        for (text, reason) in [
            (String::from(r#"{"version": 1"#), "EOF"),
            (format!("{COMMAND}, \"surprise\": 1}}"), "unknown field `surprise`"),
            (format!("{COMMAND}, \"argv\": [\"a\\u0000b\"]}}"), "NUL"),
            (format!("{}}}", COMMAND.replace("1,", "7,")), "version 7"),
            (
                format!("{COMMAND}, \"sockets\": {{\"listen\": true, \"connect\": true, \"deny\": [\"x\"]}}}}"),
                "CIDR",
            ),
        ] {
            let error = Spec::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert!(
            Spec::parse(&vec![b' '; MAX_TEXT_BYTES + 1])
                .unwrap_err()
                .contains("fit")
        );
        assert!(Spec::parse(b"\xff\xfe").is_err());
    }

    #[test]
    fn a_limit_of_nothing_is_refused() {
        let mut settings = server();
        settings.max_concurrent = 0;
        assert!(settings.check().unwrap_err().contains("max_concurrent"));
    }
}
