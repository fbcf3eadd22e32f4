use std::env;

fn main() {
    let name = env::var("NAME").unwrap_or_else(|_| "World".to_string());
    println!("Hello, {}, from __NAME__!", name);
}
