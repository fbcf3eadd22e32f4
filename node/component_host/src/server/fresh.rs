//! WASI 0.2 as it is meant: each request has an instance of its own, and nothing stays.

use crate::counters::Counters;
use crate::epochs::Epochs;
use crate::guest::{Guest, Maker};
use crate::outgoing::trace_of;
use crate::server::answer::{Failure, Refusal, one_line};
use crate::server::exchange::Exchange;
use http::{Request, Response};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;
use wasmtime_wasi_http::{WasiBody, WasiHttpView};

/// Answers requests.
pub struct Fresh {
    pre: ProxyPre<Guest>,
    maker: Maker,
    epochs: Epochs,
    counters: Counters,
}

impl Fresh {
    /// For one component.
    pub fn new(pre: ProxyPre<Guest>, maker: Maker, epochs: Epochs, counters: Counters) -> Self {
        Fresh {
            pre,
            maker,
            epochs,
            counters,
        }
    }

    /// `slot`: given back when the instance is gone, which may be after the answer is.
    pub async fn answer(
        &self,
        request: Request<WasiBody>,
        exchange: Arc<Exchange>,
        slot: OwnedSemaphorePermit,
    ) -> Result<Response<WasiBody>, Failure> {
        let failed = |error: wasmtime::Error| Failure::Failed(one_line(&error));
        let (sender, receiver) = oneshot::channel();
        let mut store = self.maker.store().map_err(failed)?;
        store.data_mut().hooks.follow(trace_of(request.headers()));
        let mut view = store.data_mut().http();
        let incoming = view.new_incoming_request(Scheme::Http, request).map_err(failed)?;
        let set = exchange.clone();
        let outparam = view
            .new_response_outparam_from_callback(move |answer| {
                set.answered();
                let _ = sender.send(answer);
            })
            .map_err(failed)?;
        let (pre, counters, running) = (self.pre.clone(), self.counters, self.epochs.run());
        let guest = async move {
            let proxy = pre.instantiate_async(&mut store).await?;
            counters.instance();
            let handler = proxy.wasi_http_incoming_handler();
            handler.call_handle(&mut store, incoming, outparam).await
        };
        let task = tokio::spawn(async move {
            // Given back in this order, after the instance.
            let _kept = (slot, running);
            let mut guest = pin!(guest);
            let failure = tokio::select! {
                ended = guest.as_mut() => ended.err().map(|error| Failure::Failed(one_line(&error))),
                () = exchange.deadline.passed() => Some(Failure::TimedOut),
            };
            match failure {
                Some(failure) if exchange.answered.load(Ordering::Relaxed) => {
                    exchange.broke(&match failure {
                        Failure::TimedOut => "the guest stood still, and was ended".into(),
                        failure => Refusal::from(failure).reason,
                    });
                    None
                }
                failure => failure,
            }
        });
        match receiver.await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(code)) => Err(Failure::Code(code.into())),
            // The guest is gone and gave no answer.
            Err(_) => Err(match task.await {
                Ok(Some(failure)) => failure,
                Ok(None) => Failure::Failed("the guest returned without an answer".into()),
                Err(error) => Failure::Failed(format!("the host failed: {error}")),
            }),
        }
    }
}
