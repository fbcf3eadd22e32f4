//! Outgoing `wasi:http`, 0.2 and 0.3: only to the origins of the policy, checked again after names were resolved.
//!
//! The address that was checked is the one that is connected to. Redirects are the guest's own requests, so each is
//! checked too. Connections are kept and used again; certificates are checked against the system's roots.

mod connect;

use crate::policy::{Guard, Origin, Origins};
use crate::server::body::Limited;
use crate::spec::Outgoing;
use connect::{ConnectError, Connector};
use http::{HeaderMap, HeaderName, Request, Response};
use http_body_util::BodyExt;
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use wasmtime_wasi_http::{Error, RequestOptions, WasiBody, WasiHttpHooks};

/// Where a trace of a request goes on: see [`Hooks::follow`].
const TRACE_HEADERS: [HeaderName; 2] = [
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
];
const POOL_IDLE: Duration = Duration::from_secs(60);
const POOL_CONNECTIONS_PER_ORIGIN: usize = 32;

/// Sends requests for all instances of a container.
#[derive(Clone)]
pub struct Client(Option<Arc<Inner>>);

struct Inner {
    origins: Origins,
    http: legacy::Client<Connector, WasiBody>,
    slots: Arc<Semaphore>,
    settings: Settings,
}

struct Settings {
    connect_timeout: Duration,
    request_timeout: Duration,
    idle_timeout: Duration,
    max_request_bytes: u64,
    max_response_bytes: u64,
}

impl Client {
    /// None: every request is denied.
    pub fn new(policy: Option<&Outgoing>) -> Self {
        Client(policy.map(|policy| Arc::new(Inner::new(policy))))
    }

    async fn send(self, request: Request<WasiBody>, options: RequestOptions) -> Result<Response<WasiBody>, Error> {
        let inner = self.0.ok_or(Error::HttpRequestDenied)?;
        inner.send(request, options).await
    }
}

impl Inner {
    fn new(policy: &Outgoing) -> Self {
        let guard = Guard {
            own: policy.own_addresses.clone(),
            endpoints: policy.api_servers.clone(),
            ports: policy.ports.clone(),
            deny: policy.deny.clone(),
        };
        let local = Origins::new(&policy.local_origins);
        let connect_timeout = Duration::from_millis(policy.connect_timeout_ms);
        let http = legacy::Client::builder(TokioExecutor::new())
            .pool_idle_timeout(POOL_IDLE)
            .pool_max_idle_per_host(POOL_CONNECTIONS_PER_ORIGIN)
            .pool_timer(TokioTimer::new())
            .set_host(false)
            .build(Connector::new(guard, local, policy.roots.clone(), connect_timeout));
        Inner {
            origins: Origins::new(&policy.origins),
            http,
            slots: Arc::new(Semaphore::new(policy.max_concurrent as usize)),
            settings: Settings {
                connect_timeout,
                request_timeout: Duration::from_millis(policy.request_timeout_ms),
                idle_timeout: Duration::from_millis(policy.idle_timeout_ms),
                max_request_bytes: policy.max_request_bytes,
                max_response_bytes: policy.max_response_bytes,
            },
        }
    }

    async fn send(&self, request: Request<WasiBody>, options: RequestOptions) -> Result<Response<WasiBody>, Error> {
        let origin = Origin::of(request.uri()).ok_or(Error::HttpRequestUriInvalid)?;
        if !self.origins.allow(&origin) {
            return Err(Error::HttpRequestDenied);
        }
        let slot = self
            .slots
            .clone()
            .try_acquire_owned()
            .map_err(|_| Error::ConnectionLimitReached)?;
        let limits = &self.settings;
        let first_byte = options.first_byte_timeout.unwrap_or(limits.request_timeout);
        let most = options
            .connect_timeout
            .unwrap_or(limits.connect_timeout)
            .saturating_add(first_byte);
        let idle = options
            .between_bytes_timeout
            .unwrap_or(limits.idle_timeout)
            .min(limits.idle_timeout);
        let request = request.map(|body| Limited::new(body, limits.max_request_bytes, None).boxed_unsync());
        let answer = tokio::time::timeout(most.min(limits.request_timeout), self.http.request(request))
            .await
            .map_err(|_| Error::HttpResponseTimeout)?
            .map_err(as_error)?;
        Ok(answer.map(|body| {
            // The slot is free again when the guest has read or dropped the answer.
            let body = body.map_err(Error::from).map_frame(move |frame| {
                let _ = &slot;
                frame
            });
            Limited::new(body, limits.max_response_bytes, Some(idle)).boxed_unsync()
        }))
    }
}

fn as_error(error: legacy::Error) -> Error {
    let mut cause = error.source();
    while let Some(found) = cause {
        if let Some(refused) = found.downcast_ref::<ConnectError>() {
            return refused.as_error();
        }
        if found.is::<hyper::Error>() {
            return Error::HttpProtocolError;
        }
        cause = found.source();
    }
    Error::InternalError(Some(error.to_string()))
}

/// What an instance asks when it sends a request.
pub struct Hooks {
    client: Client,
    trace: HeaderMap,
}

impl Hooks {
    /// For a new instance.
    pub fn new(client: Client) -> Self {
        Hooks {
            client,
            trace: HeaderMap::new(),
        }
    }

    /// Requests that the guest sends from now on carry these trace headers, unless they have their own.
    pub fn follow(&mut self, trace: HeaderMap) {
        self.trace = trace;
    }
}

/// Those of a request's headers that name its trace; mostly none, which takes no memory.
pub fn trace_of(incoming: &HeaderMap) -> HeaderMap {
    let mut trace = HeaderMap::new();
    for name in &TRACE_HEADERS {
        if let Some(value) = incoming.get(name) {
            trace.insert(name, value.clone());
        }
    }
    trace
}

type Io = Box<dyn Future<Output = Result<(), Error>> + Send>;
type Sent = Result<(Response<WasiBody>, Io), Error>;

impl WasiHttpHooks for Hooks {
    fn send_request(
        &mut self,
        mut request: Request<WasiBody>,
        options: Option<RequestOptions>,
        _body_ended: Io,
    ) -> Box<dyn Future<Output = Sent> + Send> {
        if !TRACE_HEADERS.iter().any(|name| request.headers().contains_key(name)) {
            request.headers_mut().extend(self.trace.clone());
        }
        let client = self.client.clone();
        Box::new(async move {
            let answer = client.send(request, options.unwrap_or_default()).await?;
            // The pool drives the connection, so there is nothing left to wait for.
            Ok((answer, Box::new(async { Ok(()) }) as Io))
        })
    }
}
