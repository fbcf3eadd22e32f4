//! Asks an HTTP API for a cat fact, logs it, waits, and asks again, for ever.
//!
//! `CAT_FACTS_URL` is the API (default <https://catfact.ninja/fact>), `INTERVAL_SECONDS` the wait (default 60). The
//! node lets a request out only to the origins that the pod's annotation `alpha.wasi.krustlet.dev/allowed-domains`
//! names. A request that fails is logged and tried again at the next turn: a service must outlive its neighbours.

use std::{env, process, str, thread, time::Duration};

use anyhow::{anyhow, bail, Context, Result};
use serde_json::Value;

const DEFAULT_URL: &str = "https://catfact.ninja/fact";
const DEFAULT_SECONDS: f64 = 60.0;

fn cat_fact(url: &str) -> Result<String> {
    let request = http::request::Builder::new()
        .method(http::Method::GET)
        .uri(url)
        .header("Accept", "application/json")
        .body(None)
        .context("the URL makes no request")?;
    log::debug!("Request: {:?}", request);

    let mut response = wasi_experimental_http::request(request)?;
    let body = response.body_read_all()?;
    let text = str::from_utf8(&body).context("the answer is not text")?;
    log::debug!("Response: {} {:?}", response.status_code, text);
    if !response.status_code.is_success() {
        bail!("the API answered {}", response.status_code);
    }

    let answer: Value = serde_json::from_str(text).context("the answer is not JSON")?;
    let fact = answer["fact"].as_str().ok_or_else(|| anyhow!("the answer holds no fact"))?;
    Ok(fact.to_string())
}

fn interval() -> Result<Duration> {
    let seconds = match env::var("INTERVAL_SECONDS") {
        Ok(text) => text.parse::<f64>().ok().filter(|seconds| (0.001..=86_400.0).contains(seconds)),
        Err(_) => Some(DEFAULT_SECONDS),
    };
    seconds
        .map(Duration::from_secs_f64)
        .ok_or_else(|| anyhow!("INTERVAL_SECONDS must be a number from 0.001 to 86400"))
}

fn main() {
    env_logger::init();
    let url = env::var("CAT_FACTS_URL").unwrap_or_else(|_| DEFAULT_URL.to_string());
    let interval = interval().unwrap_or_else(|error| {
        eprintln!("{}", error);
        process::exit(2)
    });
    loop {
        match cat_fact(&url) {
            Ok(fact) => log::info!("Cat Fact: {}", fact),
            Err(error) => log::error!("No cat fact from {}: {:#}", url, error),
        }
        thread::sleep(interval);
    }
}
