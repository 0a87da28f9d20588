//! An upload in parts that grow with what is uploaded: cloud stores take 10,000 parts, and up to 5 TiB in them.

use bytes::Bytes;
use object_store::{MultipartUpload, PutPayload};
use tokio::task::JoinSet;

/// How large the parts of an upload are.
#[derive(Clone, Copy, Debug)]
pub(super) struct PartSizes {
    /// The first ones.
    pub(super) smallest: u64,
    /// None is larger.
    pub(super) largest: u64,
}

/// A part is the bytes before it divided by this: the first thousand parts are alike, and 9,000 more hold a thousand
/// times as much.
const SHARE: u64 = 1_000;

impl PartSizes {
    /// Parts that S3, Google Cloud Storage and Azure take: 5 MiB at least, and 5 TiB in 10,000 of them. Files of up to 5 GiB
    /// are uploaded in parts of one size, which some stores that speak S3 insist on.
    pub(super) const CLOUD: Self = Self { smallest: 5 << 20, largest: 1_280 << 20 };

    /// The size of the part that follows so many bytes.
    fn after(self, sent: u64) -> u64 {
        (sent / SHARE).clamp(self.smallest, self.largest)
    }
}

/// An upload under way: one part is sent while the next one is gathered.
pub(super) struct Upload {
    parts: Box<dyn MultipartUpload>,
    sizes: PartSizes,
    gathered: Vec<Bytes>,
    size: u64,
    sent: u64,
    under_way: JoinSet<object_store::Result<()>>,
}

impl Upload {
    pub(super) fn new(parts: Box<dyn MultipartUpload>, sizes: PartSizes) -> Self {
        Self { parts, sizes, gathered: Vec::new(), size: 0, sent: 0, under_way: JoinSet::new() }
    }

    /// Adds bytes; waits while the part before is on its way.
    pub(super) async fn put(&mut self, bytes: Bytes) -> object_store::Result<()> {
        self.size += bytes.len() as u64;
        self.gathered.push(bytes);
        if self.size >= self.sizes.after(self.sent) { self.send().await } else { Ok(()) }
    }

    async fn send(&mut self) -> object_store::Result<()> {
        self.wait().await?;
        let part: PutPayload = std::mem::take(&mut self.gathered).into_iter().collect();
        self.sent += std::mem::take(&mut self.size);
        self.under_way.spawn(self.parts.put_part(part));
        Ok(())
    }

    async fn wait(&mut self) -> object_store::Result<()> {
        while let Some(sent) = self.under_way.join_next().await {
            sent??;
        }
        Ok(())
    }

    /// Sends what is left; the object becomes visible.
    pub(super) async fn finish(mut self) -> object_store::Result<()> {
        if self.size > 0 {
            self.send().await?;
        }
        self.wait().await?;
        self.parts.complete().await.map(drop)
    }

    /// Gives it up; nothing becomes visible.
    pub(super) async fn abort(mut self) -> object_store::Result<()> {
        self.under_way.shutdown().await;
        self.parts.abort().await
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use object_store::{PutResult, UploadPart};

    use super::*;

    const MOST_PARTS: u64 = 10_000;

    /// Refuses part 10,001, as S3 does.
    #[derive(Debug, Default)]
    struct Picky {
        parts: Arc<AtomicU64>,
        bytes: Arc<AtomicU64>,
    }

    type Answer<'a, T> = Pin<Box<dyn Future<Output = object_store::Result<T>> + Send + 'a>>;

    impl MultipartUpload for Picky {
        fn put_part(&mut self, data: PutPayload) -> UploadPart {
            let (parts, bytes) = (self.parts.clone(), self.bytes.clone());
            Box::pin(async move {
                bytes.fetch_add(data.content_length() as u64, Ordering::Relaxed);
                if parts.fetch_add(1, Ordering::Relaxed) < MOST_PARTS {
                    return Ok(());
                }
                Err(object_store::Error::NotSupported { source: "part number over 10000".into() })
            })
        }

        fn complete<'a, 'b>(&'a mut self) -> Answer<'b, PutResult>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(async {
                Ok(PutResult { e_tag: None, version: None, extensions: object_store::Extensions::default() })
            })
        }

        fn abort<'a, 'b>(&'a mut self) -> Answer<'b, ()>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(async { Ok(()) })
        }
    }

    async fn uploaded(sizes: PartSizes, pieces: usize) -> (object_store::Result<()>, u64, u64) {
        let picky = Picky::default();
        let (parts, bytes) = (picky.parts.clone(), picky.bytes.clone());
        let mut upload = Upload::new(Box::new(picky), sizes);
        for _ in 0..pieces {
            if let Err(error) = upload.put(Bytes::from_static(b"0123456789")).await {
                return (Err(error), parts.load(Ordering::Relaxed), 0);
            }
        }
        let outcome = upload.finish().await;
        (outcome, parts.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn parts_grow_so_that_no_store_sees_more_than_ten_thousand() {
        let alike = PartSizes { smallest: 10, largest: 10 };
        assert!(uploaded(alike, 10_001).await.0.is_err(), "parts of one size are too many");
        let growing = PartSizes { smallest: 10, largest: 2_560 };
        let (outcome, parts, bytes) = uploaded(growing, 600_000).await;
        assert!(outcome.is_ok(), "{outcome:?}");
        assert!(parts <= MOST_PARTS && bytes == 6_000_000, "{parts} parts with {bytes} bytes");
    }

    #[test]
    fn five_tebibytes_fit_into_ten_thousand_parts() {
        let sizes = PartSizes::CLOUD;
        let (mut sent, mut alike) = (0, 0);
        for _ in 0..MOST_PARTS {
            let size = sizes.after(sent);
            assert!((5 << 20..=5 << 30).contains(&size));
            alike += u64::from(size == 5 << 20);
            sent += size;
        }
        assert!(sent >= 5 << 40, "{sent} bytes");
        assert!(alike >= 1_000);
    }
}
