//! A body that may be only so long and must not stand still.

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep};
use wasmtime_wasi_http::Error;

/// Ends with an error after `max` bytes, or when nothing came for `idle`.
pub struct Limited<B> {
    inner: B,
    left: u64,
    max: u64,
    idle: Option<Duration>,
    /// Made when the body first keeps its reader waiting.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl<B> Limited<B> {
    /// Trailers count for nothing.
    pub fn new(inner: B, max: u64, idle: Option<Duration>) -> Self {
        Limited {
            inner,
            left: max,
            max,
            idle,
            sleep: None,
        }
    }

    fn stands_still(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(idle) = self.idle else { return false };
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(idle)));
        sleep.as_mut().poll(cx).is_ready()
    }

    fn take(&mut self, frame: Frame<Bytes>) -> Result<Frame<Bytes>, Error> {
        if let (Some(idle), Some(sleep)) = (self.idle, &mut self.sleep) {
            sleep.as_mut().reset(Instant::now() + idle);
        }
        let length = frame.data_ref().map_or(0, |data| data.len() as u64);
        match self.left.checked_sub(length) {
            Some(left) => {
                self.left = left;
                Ok(frame)
            }
            None => Err(Error::HttpRequestBodySize(Some(self.max))),
        }
    }
}

impl<B> Body for Limited<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Error>,
{
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match Pin::new(&mut self.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => Poll::Ready(Some(self.take(frame))),
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error.into()))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending if self.stands_still(cx) => Poll::Ready(Some(Err(Error::ConnectionReadTimeout))),
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{BodyExt, Full};
    use std::convert::Infallible;

    fn limited(max: u64) -> Limited<Full<Bytes>> {
        Limited::new(Full::new(Bytes::from_static(b"0123456789")), max, None)
    }

    #[tokio::test]
    async fn the_last_byte_passes_and_one_more_does_not() {
        assert_eq!(limited(10).collect().await.unwrap().to_bytes().len(), 10);
        let error = limited(9).collect().await.unwrap_err();
        assert!(matches!(error, Error::HttpRequestBodySize(Some(9))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stands_still_ends() {
        struct Never;
        impl Body for Never {
            type Data = Bytes;
            type Error = Infallible;
            fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
                Poll::Pending
            }
        }
        let body = Limited::new(Never, 1, Some(Duration::from_secs(60)));
        let error = body.collect().await.unwrap_err();
        assert!(matches!(error, Error::ConnectionReadTimeout));
    }
}
