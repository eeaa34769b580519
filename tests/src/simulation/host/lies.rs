//! What a host says that somebody else has taken over, or whose disk lies.

use super::*;

impl Host {
    /// What a host says that somebody else has taken over, or whose disk lies.
    pub(super) fn lie(&mut self, manifest: &Manifest, sight: &mut Sight<'_>) {
        let files = || {
            let files = manifest.files.iter();
            let state = files.map(|file| FileState {
                name: file.name.clone(),
                size: file.size,
                sha256: file.sha256,
            });
            state.collect()
        };
        let sha256 = Digest::of(&serde_json::to_vec(manifest).expect("it serialises"));
        let position = manifest.position();
        let (which, install) = (
            sight.random.random_range(0..8),
            sight.random.random_range(0..5),
        );
        let claim = |position: Position, sha256, outcome| Receipt {
            fleet: FleetName::clone(&manifest.fleet),
            agent: self.name.clone(),
            seq: 0,
            epoch: position.epoch,
            generation: position.generation,
            manifest_sha256: sha256,
            install,
            outcome,
            files: files(),
            foreign: Vec::new(),
            drift: Vec::new(),
            clamd: self.report(),
            error: Some("so it says".to_owned()),
            took: 0.0,
            time: sight.clock,
        };
        let higher = |by| {
            let number = position.generation.number() + by;
            let generation = clamcast_proto::Generation::new(number).expect("not zero");
            Position {
                generation,
                ..position
            }
        };
        let lie = match which {
            0 | 1 => claim(position, sha256, Outcome::Live),
            2 => claim(
                higher(1),
                Digest::of(b"nobody published this"),
                Outcome::Live,
            ),
            3 => claim(higher(1000), Digest::of(b"nor this"), Outcome::Installed),
            4 => claim(
                position,
                Digest::of(b"another under its number"),
                Outcome::Live,
            ),
            5 => claim(position, sha256, Outcome::Refused),
            6 => {
                let message = "no".to_owned();
                let offer = OfferId(u64::MAX);
                return self.say(Said::Declined { offer, message }, sight);
            }
            _ => {
                // What it said before, once more; or nothing.
                if let Some(old) = self.disk.receipts.values().next().cloned() {
                    self.say(Said::Receipt(Box::new(old)), sight);
                }
                return;
            }
        };
        self.send(lie, sight);
    }
}
