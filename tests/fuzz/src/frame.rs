//! `frame`: what master and agent read from each other's streams.

use std::fmt::Debug;

use clamcast_proto::wire::{
    self, FRAME_BYTES_MAX, FrameError, PART_BYTES_MAX, Part, ToAgent, ToMaster,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{render, statement};

/// Longest message of an error, in bytes. The master sends it to the agent and logs it, so a peer
/// must not be able to choose its length.
const ERROR_BYTES_MAX: usize = 1000;

/// Reads the input as frames of both directions, as the header of a bulk stream, as the JSON of one
/// frame, and as the statements that frames carry.
pub fn frame(bytes: &[u8]) -> bool {
    let mut accepted = false;
    for limit in [FRAME_BYTES_MAX, PART_BYTES_MAX] {
        let mut stream = bytes;
        while let Some((prefix, rest)) = stream.split_first_chunk() {
            let Ok(length) = wire::frame_length(*prefix, limit) else {
                break;
            };
            assert!(length <= limit);
            let Some((json, rest)) = rest.split_at_checked(length) else {
                break;
            };
            accepted |= message(json);
            stream = rest;
        }
    }
    accepted |= message(bytes);
    accepted |= statement::carried(bytes);
    accepted
}

fn message(json: &[u8]) -> bool {
    let to_agent = same_again::<ToAgent>(json);
    let to_master = same_again::<ToMaster>(json);
    let part = same_again::<Part>(json);
    to_agent || to_master || part
}

/// Reads a message. A message that is accepted survives its frame.
fn same_again<T: DeserializeOwned + Serialize + Debug>(json: &[u8]) -> bool {
    let message: T = match wire::parse(json) {
        Ok(message) => message,
        Err(error) => {
            let text = render(&error);
            assert!(text.len() <= ERROR_BYTES_MAX, "{} bytes", text.len());
            assert!(!text.contains(char::is_control), "{text:?}");
            return false;
        }
    };
    let frame = match wire::frame(&message) {
        Ok(frame) => frame,
        Err(FrameError::TooLong { length, .. }) => {
            assert!(length > FRAME_BYTES_MAX && json.len() > FRAME_BYTES_MAX / 8);
            return true;
        }
        Err(error @ (FrameError::Message { .. } | FrameError::Json { .. })) => panic!("{error}"),
    };
    let (prefix, json) = frame.split_first_chunk().expect("a frame has a length");
    assert_eq!(
        wire::frame_length(*prefix, FRAME_BYTES_MAX).ok(),
        Some(json.len())
    );
    let again: T = wire::parse(json).expect("what we write, we read");
    assert_eq!(format!("{again:?}"), format!("{message:?}"));
    assert_eq!(wire::frame(&again).ok().as_ref(), Some(&frame));
    true
}
