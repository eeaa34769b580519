//! Hands libFuzzer's inputs to `clamcast_fuzz::delta`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    clamcast_fuzz::delta(bytes);
});
