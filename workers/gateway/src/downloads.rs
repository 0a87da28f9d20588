//! Downloads (contract 7): decrypted on the fly, a window at a time; the token is the credential.

use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderName,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::response::Response;
use futures_util::{Stream, stream};
use lethe_db::results::{self, Downloadable};
use lethe_domain::request::RequestType;
use lethe_domain::result_link;
use lethe_results::cipher::{CHUNK, Decryptor};
use lethe_results::store::Store;
use object_store::ObjectStoreExt;
use object_store::path::Path as ObjectPath;
use tokio::sync::OwnedSemaphorePermit;

use crate::ranges::{Wanted, wanted};
use crate::refusal::Refusal;
use crate::state::{Files, Gateway};

/// Chunks that are fetched and decrypted at once: the memory of a download is about twice their size.
const WINDOW: u64 = 16;

/// A result file, or a range of it.
#[utoipa::path(get, path = "/v3/results/{token}", tag = "results", operation_id = "download",
    params(("token" = String, Path, description = "From `results_url`; it is the credential"),
           ("Range" = Option<String>, Header, description = "One range of bytes")),
    responses(
        (status = 200, description = "The file: JSON Lines for access, zip for portability",
         content((Vec<u8> = "text/plain"), (Vec<u8> = "application/zip"))),
        (status = 206, description = "The range", content((Vec<u8> = "text/plain"), (Vec<u8> = "application/zip"))),
        (status = 403, description = "Downloaded too many times", body = crate::schemas::ErrorAnswer),
        (status = 404, description = "Unknown token, or nothing matched", body = crate::schemas::ErrorAnswer),
        (status = 410, description = "The link has expired", body = crate::schemas::ErrorAnswer),
        (status = 416, description = "The range is outside the file", body = crate::schemas::ErrorAnswer),
        (status = 429, description = "Too many calls", body = crate::schemas::ErrorAnswer),
        (status = 503, description = "Temporarily unavailable", body = crate::schemas::ErrorAnswer)))]
pub(crate) async fn download(
    State(gateway): State<Arc<Gateway>>,
    token: Result<Path<String>, PathRejection>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let unknown = || Refusal::new(404, "there is no result at this address");
    let Path(token) = token.map_err(|_| unknown())?;
    let digest = result_link::token_digest(&token);
    let session = gateway.db.session().await?;
    let found = results::find(&session, &digest).await?;
    drop(session);
    let result = found.ok_or_else(unknown)?;
    let (path, decryptor) = open(&gateway.files, &result).await?;
    let etag = format!("\"{}\"", result.result_id);
    let part = match wanted(&headers, result.size_bytes, &etag) {
        Wanted::Whole => None,
        Wanted::Part(range) => Some(range),
        Wanted::Unsatisfiable => return Err(Refusal::range(result.size_bytes)),
    };
    let bytes = part.clone().unwrap_or(0..=result.size_bytes.saturating_sub(1));
    let body = if method == Method::HEAD {
        Body::empty()
    } else {
        let busy = |_| Refusal::later("this server has as many downloads under way as it allows; try again");
        let place = gateway.files.places.clone().try_acquire_owned().map_err(busy)?;
        // First the audit trail: whatever is handed out is on record, even if the client sees only half of it.
        let session = gateway.db.session().await?;
        if !results::record_download(&session, &digest, (*bytes.start(), *bytes.end())).await? {
            return Err(Refusal::new(403, "this result was downloaded too many times; request your data again"));
        }
        drop(session);
        let file = File { store: gateway.files.store.clone(), path, decryptor, size: result.size_bytes, place };
        Body::from_stream(file.stream(bytes.clone()))
    };
    Ok(respond(&result, &etag, part, bytes, body))
}

/// Where the bytes lie, and what decrypts them.
async fn open(files: &Files, result: &Downloadable) -> Result<(ObjectPath, Decryptor), Refusal> {
    if result.expired {
        return Err(Refusal::new(410, "this result has expired"));
    }
    let Some((path, wrapped)) = result.object_path.as_ref().zip(result.wrapped_key.as_ref()) else {
        return Err(Refusal::new(404, "nothing matched the identities of this request, so there is no file"));
    };
    // The key of a day outlives every link of that day: one that is missing here is in another store, not destroyed.
    let day_key = files.day_keys.get(result.expiry_day).await.map_err(|error| unreadable(result, &error))?;
    let key = day_key.open(result.result_id.as_bytes(), wrapped).map_err(|error| unreadable(result, &error))?;
    let key = <[u8; 32]>::try_from(key).map_err(|_| Refusal::new(500, "the key of this result cannot be used"))?;
    let decryptor = Decryptor::new(&key, result.size_bytes).map_err(|error| unreadable(result, &error))?;
    Ok((ObjectPath::from(path.as_str()), decryptor))
}

fn unreadable(result: &Downloadable, error: &dyn std::error::Error) -> Refusal {
    tracing::error!(%error, result = %result.result_id, "a result cannot be read");
    Refusal::later("the result cannot be read at the moment; try again")
}

fn respond(
    result: &Downloadable,
    etag: &str,
    part: Option<RangeInclusive<u64>>,
    bytes: RangeInclusive<u64>,
    body: Body,
) -> Response {
    let mut response = Response::new(body);
    let length = if result.size_bytes == 0 { 0 } else { bytes.end() - bytes.start() + 1 };
    let extension = if result.request_type == RequestType::Portability { "zip" } else { "jsonl" };
    let name = format!("{}-{}.{extension}", result.request_type, result.subject_request_id);
    let mut header = |name: HeaderName, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().insert(name, value);
        }
    };
    header(CONTENT_TYPE, &result.media_type);
    header(CONTENT_LENGTH, &length.to_string());
    header(CONTENT_DISPOSITION, &format!("attachment; filename=\"{name}\""));
    header(ACCEPT_RANGES, "bytes");
    header(ETAG, etag);
    if let Some(part) = part {
        header(CONTENT_RANGE, &format!("bytes {}-{}/{}", part.start(), part.end(), result.size_bytes));
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    response
}

struct File {
    store: Store,
    path: ObjectPath,
    decryptor: Decryptor,
    size: u64,
    /// Held until the last byte is handed on, or the client has gone.
    #[expect(dead_code, reason = "it is there to be dropped")]
    place: OwnedSemaphorePermit,
}

impl File {
    /// The plain bytes of a range, a window at a time. A window that cannot be read cuts the answer short: from
    /// its length the client can tell that it is not whole.
    fn stream(self, bytes: RangeInclusive<u64>) -> impl Stream<Item = io::Result<Bytes>> {
        let first = bytes.start() / CHUNK as u64;
        stream::try_unfold((self, first), move |(file, chunk)| {
            let bytes = bytes.clone();
            async move {
                let last = bytes.end() / CHUNK as u64;
                if file.size == 0 || chunk > last {
                    return Ok(None);
                }
                let until = last.min(chunk + WINDOW - 1);
                let window = file.window(chunk..=until).await.inspect_err(|error| {
                    tracing::error!(%error, "a download was aborted: the result cannot be read");
                })?;
                let start = chunk * CHUNK as u64;
                let cut = |position: u64| usize::try_from(position - start).unwrap_or(usize::MAX);
                let begin = cut(start.max(*bytes.start())).min(window.len());
                let end = cut(bytes.end() + 1).min(window.len());
                Ok(Some((Bytes::from(window).slice(begin..end), (file, until + 1))))
            }
        })
    }

    async fn window(&self, chunks: RangeInclusive<u64>) -> io::Result<Vec<u8>> {
        let start = self.decryptor.range(*chunks.start()).start;
        let sealed = self.store.get_range(&self.path, start..self.decryptor.range(*chunks.end()).end).await?;
        let mut plain = Vec::with_capacity(sealed.len());
        for chunk in chunks {
            let range = self.decryptor.range(chunk);
            let place = usize::try_from(range.start - start).ok().zip(usize::try_from(range.end - start).ok());
            let part = place.and_then(|(from, to)| sealed.get(from..to));
            let part = part.ok_or_else(|| io::Error::other("the object is shorter than its record"))?;
            plain.extend(self.decryptor.open(chunk, part).map_err(io::Error::other)?);
        }
        Ok(plain)
    }
}
