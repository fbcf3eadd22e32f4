//! A connection to an origin: resolve, check, connect, TLS.

use crate::policy::{Guard, Origin, Origins};
use crate::server::log;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use wasmtime_wasi_http::Error;

/// Why there is no connection.
#[derive(Debug)]
pub enum ConnectError {
    /// Every address that the name has is refused by the policy.
    Prohibited,
    /// The name has no address.
    Unknown,
    /// The peer, or the way to it.
    Io(std::io::Error),
    /// Handshake or certificate.
    Tls(std::io::Error),
    /// It took too long.
    TimedOut,
    /// No certificates to check against.
    NoRoots,
    /// What is asked for cannot be asked for.
    Uri,
}

impl ConnectError {
    /// As the guest sees it.
    pub fn as_error(&self) -> Error {
        match self {
            ConnectError::Prohibited => Error::DestinationIpProhibited,
            ConnectError::Unknown => Error::DnsError {
                rcode: Some("name not known".into()),
                info_code: None,
            },
            ConnectError::Io(error) => Error::Connect(std::io::Error::new(error.kind(), error.to_string())),
            ConnectError::Tls(error) if certificate(error) => Error::TlsCertificateError,
            ConnectError::Tls(_) => Error::TlsProtocolError,
            ConnectError::TimedOut => Error::ConnectionTimeout,
            ConnectError::NoRoots => Error::ConfigurationError,
            ConnectError::Uri => Error::HttpRequestUriInvalid,
        }
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{self:?}")
    }
}

impl std::error::Error for ConnectError {}

fn certificate(error: &std::io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(inner, Some(rustls::Error::InvalidCertificate(_)))
}

/// Makes connections for the pool.
#[derive(Clone)]
pub struct Connector {
    guard: Arc<Guard>,
    local: Arc<Origins>,
    roots: Option<PathBuf>,
    timeout: Duration,
    tls: Arc<OnceLock<Option<TlsConnector>>>,
}

impl Connector {
    /// `local`: origins that the guard does not judge. `roots`: a PEM file, read when first needed.
    pub fn new(guard: Guard, local: Origins, roots: Option<PathBuf>, timeout: Duration) -> Self {
        Connector {
            guard: Arc::new(guard),
            local: Arc::new(local),
            roots,
            timeout,
            tls: Arc::default(),
        }
    }

    async fn open(self, uri: http::Uri) -> Result<Stream, ConnectError> {
        let origin = Origin::of(&uri).ok_or(ConnectError::Uri)?;
        let opened = async {
            let plain = self.dial(&origin).await?;
            if !origin.tls {
                return Ok(Stream::Plain(TokioIo::new(plain)));
            }
            let tls = self.tls.get_or_init(|| tls(self.roots.as_ref())).clone();
            let name = ServerName::try_from(origin.host.clone()).map_err(|_| ConnectError::Uri)?;
            let stream = tls
                .ok_or(ConnectError::NoRoots)?
                .connect(name, plain)
                .await
                .map_err(ConnectError::Tls)?;
            Ok(Stream::Tls(Box::new(TokioIo::new(stream))))
        };
        tokio::time::timeout(self.timeout, opened)
            .await
            .map_err(|_| ConnectError::TimedOut)?
    }

    async fn dial(&self, origin: &Origin) -> Result<TcpStream, ConnectError> {
        let trusted = self.local.allow(origin);
        if !trusted && self.guard.refuses_name(&origin.host, origin.port) {
            return Err(ConnectError::Prohibited);
        }
        let found = tokio::net::lookup_host((origin.host.as_str(), origin.port)).await;
        let found: Vec<SocketAddr> = found.map_err(|_| ConnectError::Unknown)?.collect();
        // One address that is refused says what the name is for.
        if !trusted
            && found
                .iter()
                .any(|address| self.guard.refuses_address(address.ip(), origin.port))
        {
            return Err(ConnectError::Prohibited);
        }
        let mut last = ConnectError::Unknown;
        for address in found {
            match TcpStream::connect(address).await {
                // A machine that speaks to itself has one address at both ends: the kernel's word, before a byte is
                // sent, for an address that the node got after the policy was made.
                Ok(stream) if !trusted && to_itself(&stream) => return Err(ConnectError::Prohibited),
                Ok(stream) => {
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Err(error) => last = ConnectError::Io(error),
            }
        }
        Err(last)
    }
}

fn to_itself(stream: &TcpStream) -> bool {
    match (stream.local_addr(), stream.peer_addr()) {
        (Ok(here), Ok(there)) => here.ip() == there.ip(),
        _ => true,
    }
}

/// None, and a line in the log, where there is nothing to check certificates against.
fn tls(roots: Option<&PathBuf>) -> Option<TlsConnector> {
    let why = |text: String| log("outgoing HTTPS", &format!("no certificates to trust: {text}"));
    let Some(path) = roots else {
        why("the node has found none".into());
        return None;
    };
    let mut store = rustls::RootCertStore::empty();
    match CertificateDer::pem_file_iter(path) {
        // One that rustls does not understand takes nothing from the others.
        Ok(found) => found.flatten().for_each(|certificate| drop(store.add(certificate))),
        Err(error) => why(format!("{}: {error:?}", path.display())),
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .ok()?
        .with_root_certificates(store)
        .with_no_client_auth();
    Some(TlsConnector::from(Arc::new(config)))
}

impl tower_service::Service<http::Uri> for Connector {
    type Response = Stream;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, ConnectError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: http::Uri) -> Self::Future {
        Box::pin(self.clone().open(uri))
    }
}

/// Plain or TLS.
pub enum Stream {
    /// http
    Plain(TokioIo<TcpStream>),
    /// https
    Tls(Box<TokioIo<TlsStream<TcpStream>>>),
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl Read for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: ReadBufCursor<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_read(cx, into),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, into),
        }
    }
}

impl Write for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_write(cx, data),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, data),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }
}
