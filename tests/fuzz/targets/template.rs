//! See `support::fuzz::template`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| support::fuzz::template(data));
