//! Result files as a download would give them.

use std::io::Read;

use lethe_results::cipher::Decryptor;
use lethe_results::day_keys::DayKeys;
use lethe_results::store;
use tokio_postgres::Row;

use crate::world::World;

/// Decrypts the result of a request, by way of the key of its day.
pub async fn open(world: &World, id: &str) -> Vec<u8> {
    let row = record(world, id).await;
    let (result_id, path, size): (uuid::Uuid, String, i64) =
        (row.get("result_id"), row.get("object_path"), row.get("size_bytes"));
    let (wrapped, day): (Vec<u8>, jiff::civil::Date) = (row.get("wrapped_key"), row.get("expiry_day"));
    let day_keys = DayKeys::new(open_store(world, "keys"), world.keys());
    let key = day_keys.get(day).await.unwrap().open(result_id.as_bytes(), &wrapped).unwrap();
    let sealed = store::read(&open_store(world, "results"), &path).await.unwrap().expect("the object is there");
    let key: [u8; 32] = key.try_into().unwrap();
    let plain = Decryptor::new(&key, u64::try_from(size).unwrap()).unwrap().open_all(&sealed).unwrap();
    assert_eq!(plain.len(), usize::try_from(size).unwrap());
    plain
}

fn open_store(world: &World, part: &str) -> store::Store {
    let url = url::Url::from_file_path(world.folder.join(part)).unwrap();
    store::open("LETHE_RESULT_STORE", &url).unwrap()
}

/// The record of the result of a request.
pub async fn record(world: &World, id: &str) -> Row {
    let sql = "SELECT s.* FROM lethe.results s JOIN lethe.requests r USING (request_key) WHERE r.subject_request_id::text = $1";
    world.db.session().await.unwrap().raw().query_one(sql, &[&id]).await.unwrap()
}

/// The number of lines; the last one ends like the others.
pub fn lines(bytes: &[u8]) -> usize {
    assert_eq!(bytes.last(), Some(&b'\n'));
    bytes.split(|byte| *byte == b'\n').count() - 1
}

/// The files of a zip, by name, in order.
pub fn unzip(bytes: Vec<u8>) -> Vec<(String, Vec<u8>)> {
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(bytes)).unwrap();
    (0..archive.len())
        .map(|index| {
            let mut file = archive.by_index(index).unwrap();
            let mut content = Vec::new();
            file.read_to_end(&mut content).unwrap();
            (file.name().unwrap().into_owned(), content)
        })
        .collect()
}

/// The files of a folder, at any depth.
pub fn files_below(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files
}
