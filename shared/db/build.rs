//! Rebuilds the library when a migration is added: they are embedded.

fn main() {
    println!("cargo:rerun-if-changed=schema/migrations");
}
