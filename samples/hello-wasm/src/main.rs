//! The smallest program that a pod can run to its end.

fn main() {
    println!("Hello, World!");
}
