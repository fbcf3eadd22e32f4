//! Taking connections, and the end of a server.

use crate::ffi;
use crate::report::Report;
use crate::server::connection;
use crate::server::request::Service;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout, timeout_at};

/// After an accept that failed, which is mostly for want of descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// While lingering: no one came for this long, so no one is sent here any more.
const QUIET: Duration = Duration::from_secs(1);

/// Serve until SIGTERM, then drain: nothing that was accepted is lost. The sender of the signal limits the time.
pub async fn until_drained(
    listener: std::net::TcpListener,
    service: Arc<Service>,
    report: &Report,
) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let mut terminations = pipe::Receiver::from_owned_fd(ffi::terminations()?)?;
    report.started();
    loop {
        tokio::select! {
            _ = terminations.read_u8() => break,
            () = accept(&listener, &service) => {}
        }
    }
    linger(&listener, &service).await;
    drop(listener);
    // It may be that no one looks, with no connection.
    service.closing.send_replace(true);
    service.connections.none().await;
    let all = service.settings.max_concurrent;
    // Instances may go on after their answer.
    let _ = service.slots.acquire_many(all).await;
    Ok(())
}

async fn accept(listener: &TcpListener, service: &Arc<Service>) {
    service.connections.room().await;
    match listener.accept().await {
        Ok((stream, _)) => connection::serve(service.clone(), stream),
        Err(_) => tokio::time::sleep(ACCEPT_RETRY).await,
    }
}

/// A pod's deletion and its Service's rules run side by side: for a moment connections still come, and one that is
/// refused is a request that is lost. So they are taken while they come, within a limit.
async fn linger(listener: &TcpListener, service: &Arc<Service>) {
    service.lingering.store(true, Ordering::Relaxed);
    let end = Instant::now() + Duration::from_millis(service.settings.linger_ms);
    while Instant::now() < end {
        let quiet = end.min(Instant::now() + QUIET);
        match timeout_at(quiet, listener.accept()).await {
            Ok(Ok((stream, _))) => connection::serve(service.clone(), stream),
            Ok(Err(_)) => tokio::time::sleep(ACCEPT_RETRY).await,
            Err(_) => break,
        }
    }
    // Those that the kernel has already taken for us.
    while let Some(stream) = waiting(listener).await {
        connection::serve(service.clone(), stream);
    }
}

async fn waiting(listener: &TcpListener) -> Option<TcpStream> {
    let accepted = timeout(Duration::ZERO, listener.accept()).await;
    accepted.ok()?.ok().map(|(stream, _)| stream)
}
