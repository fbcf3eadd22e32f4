//! A wasi:http 0.3 guest for the component host's tests: one behaviour per path, the bad ones included.
use std::sync::atomic::{AtomicU32, Ordering};
use wasip3::http::types::{ErrorCode, Fields, Request, Response};
use wasip3::{wit_bindgen, wit_future, wit_stream};

wasip3::http::service::export!(Handler);
struct Handler;
static ANSWERED: AtomicU32 = AtomicU32::new(0);

impl wasip3::exports::http::handler::Guest for Handler {
    async fn handle(request: Request) -> Result<Response, ErrorCode> {
        let target = request.get_path_with_query().unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let count = ANSWERED.fetch_add(1, Ordering::Relaxed) + 1;
        match path {
            "/count" => Ok(text(format!("{count}\n"), "")),
            "/env" => Ok(text(std::env::var(query).unwrap_or_default(), "")),
            "/loop" => spin(),
            "/panic" => panic!("asked to"),
            "/error-code" => Err(ErrorCode::InternalError(Some("asked to".into()))),
            "/then-loop" => Ok(text("a piece\n".into(), "loop")),
            "/then-panic" => Ok(text("a piece\n".into(), "panic")),
            _ => Ok(text("hello\n".into(), "")),
        }
    }
}

fn text(text: String, then: &'static str) -> Response {
    let headers = Fields::new();
    if then.is_empty() {
        headers.set("content-length", &[text.len().to_string().into_bytes()]).unwrap();
    }
    let (mut body, reader) = wit_stream::new();
    let (ended, trailers) = wit_future::new(|| Ok(None));
    let (response, _sent) = Response::new(headers, Some(reader), trailers);
    wit_bindgen::spawn_local(async move {
        let _ = body.write_all(text.into_bytes()).await;
        match then {
            "loop" => spin(),
            "panic" => panic!("asked to, late"),
            _ => drop(ended),
        }
    });
    response
}

fn spin() -> ! {
    let mut number = 0u64;
    loop {
        number = std::hint::black_box(number.wrapping_mul(6364136223846793005).wrapping_add(1));
    }
}
