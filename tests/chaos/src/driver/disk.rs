//! A result store without room.

use std::io::Write;

use super::{Driver, pause};
use crate::world::Disk;

impl Driver {
    pub(super) async fn fill_disk(&self, millis: u64) {
        let folder = self.world.tests.folder.join("results");
        match self.world.disk {
            Disk::Small => {
                let ballast = folder.join(".ballast");
                if let Ok(mut file) = std::fs::File::create(&ballast) {
                    // Until it says that there is no room left.
                    while file.write_all(&[0; 8 * 1024]).is_ok() {}
                    while file.write_all(&[0]).is_ok() {}
                }
                pause(millis * 2).await;
                let _ = std::fs::remove_file(&ballast);
            }
            Disk::Replaced => {
                let aside = self.world.tests.folder.join("results-aside");
                if std::fs::rename(&folder, &aside).is_ok() {
                    let _ = std::fs::write(&folder, "full");
                    pause(millis * 2).await;
                    let _ = std::fs::remove_file(&folder);
                    let _ = std::fs::rename(&aside, &folder);
                }
            }
        }
    }
}
