//! Hands libFuzzer's inputs to `clamcast_fuzz::tar`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    clamcast_fuzz::tar(bytes);
});
