//! A publisher that writes AMQP 0-9-1 by hand, for what no client library would send.

use lapin::uri::AMQPUri;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::world::World;

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;

fn short(bytes: &[u8]) -> Vec<u8> {
    [&[u8::try_from(bytes.len()).unwrap()], bytes].concat()
}

fn long(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
}

async fn send(stream: &mut TcpStream, kind: u8, channel: u16, payload: &[u8]) {
    let frame = [&[kind], channel.to_be_bytes().as_slice(), &long(payload), &[0xCE]].concat();
    // A peer that has ended the connection is found out by reading.
    let _ = stream.write_all(&frame).await;
}

async fn method(stream: &mut TcpStream, channel: u16, class: u16, id: u16, arguments: &[u8]) {
    let payload = [class.to_be_bytes().as_slice(), &id.to_be_bytes(), arguments].concat();
    send(stream, METHOD, channel, &payload).await;
}

/// Waits for a method; anything else on the way is an error.
async fn expect(stream: &mut TcpStream, class: u16, id: u16) {
    let mut head = [0; 7];
    stream.read_exact(&mut head).await.unwrap();
    let length = u32::from_be_bytes(head[3..7].try_into().unwrap());
    let mut payload = vec![0; length as usize + 1];
    stream.read_exact(&mut payload).await.unwrap();
    let found = (u16::from_be_bytes([payload[0], payload[1]]), u16::from_be_bytes([payload[2], payload[3]]));
    assert_eq!(found, (class, id), "{}", String::from_utf8_lossy(&payload));
}

/// A property list: flags and bytes, as they stand in a content header (AMQP 0-9-1, 4.2.6.1).
pub type Properties = (u16, Vec<u8>);

/// Persistent, with a `correlation_id` of any bytes.
pub fn correlation(id: &[u8]) -> Properties {
    (1 << 12 | 1 << 10, [&[2][..], &short(id)].concat())
}

/// Persistent, with these entries of a header table.
pub fn headers(entries: &[u8]) -> Properties {
    (1 << 13 | 1 << 12, [&long(entries)[..], &[2]].concat())
}

/// An entry of a header table with a text.
pub fn text_entry(name: &str, text: &str) -> Vec<u8> {
    [&short(name.as_bytes())[..], b"S", &long(text.as_bytes())].concat()
}

/// An entry of a header table that holds a table that holds a table, and so on.
pub fn nested_entry(depth: usize) -> Vec<u8> {
    let entry = 1 + 1 + 1 + 4;
    let inner = (0..depth).rev().map(|left| u32::try_from(left * entry).unwrap().to_be_bytes());
    inner.flat_map(|length| [&short(b"a")[..], b"F", &length].concat()).collect()
}

/// An entry of a header table with a list of one text.
pub fn array_entry(name: &str, text: &str) -> Vec<u8> {
    let list = [b"S", &long(text.as_bytes())[..]].concat();
    [&short(name.as_bytes())[..], b"A", &long(&list)].concat()
}

/// An entry of a header table with a list of one table.
pub fn tables_entry(name: &str, entries: &[u8]) -> Vec<u8> {
    let list = [b"F", &long(entries)[..]].concat();
    [&short(name.as_bytes())[..], b"A", &long(&list)].concat()
}

/// A connection with a channel in confirm mode.
pub struct RawPublisher {
    stream: TcpStream,
}

impl RawPublisher {
    /// Connects as the user of the tests.
    pub async fn connect(world: &World) -> Self {
        let uri: AMQPUri = world.amqp_url.parse().unwrap();
        let (server, user) = (&uri.authority, &uri.authority.userinfo);
        let mut stream = TcpStream::connect((server.host.as_str(), server.port)).await.unwrap();
        stream.write_all(b"AMQP\x00\x00\x09\x01").await.unwrap();
        expect(&mut stream, 10, 10).await;
        let login = format!("\0{}\0{}", user.username, user.password);
        let start = [long(b""), short(b"PLAIN"), long(login.as_bytes()), short(b"en_US")].concat();
        method(&mut stream, 0, 10, 11, &start).await;
        expect(&mut stream, 10, 30).await;
        method(&mut stream, 0, 10, 31, &[0x07, 0xFF, 0x00, 0x02, 0x00, 0x00, 0x00, 0x00]).await;
        method(&mut stream, 0, 10, 40, &[short(uri.vhost.as_bytes()), short(b""), vec![0]].concat()).await;
        expect(&mut stream, 10, 41).await;
        method(&mut stream, 1, 20, 10, &short(b"")).await;
        expect(&mut stream, 20, 11).await;
        method(&mut stream, 1, 85, 10, &[0]).await;
        expect(&mut stream, 85, 11).await;
        Self { stream }
    }

    /// Publishes to `dsr.requests`, and waits for the confirm.
    pub async fn publish(&mut self, routing_key: &[u8], properties: &Properties, body: &[u8]) {
        self.begin(routing_key, properties, body).await;
        expect(&mut self.stream, 60, 80).await;
    }

    /// Publishes all to `dsr.requests` without waiting for confirms; whether the broker has read all of them, or has ended
    /// the connection over one.
    pub async fn are_read(&mut self, messages: &[(Vec<u8>, Properties, Vec<u8>)]) -> bool {
        for (routing_key, properties, body) in messages {
            self.begin(routing_key, properties, body).await;
        }
        // A call that is answered in its turn, behind the confirms.
        method(&mut self.stream, 1, 60, 10, &[0; 7]).await;
        loop {
            let mut head = [0; 7];
            if self.stream.read_exact(&mut head).await.is_err() {
                return false;
            }
            let mut payload = vec![0; u32::from_be_bytes(head[3..7].try_into().unwrap()) as usize + 1];
            if self.stream.read_exact(&mut payload).await.is_err() {
                return false;
            }
            match payload[..4] {
                [0, 60, 0, 11] => return true,
                [0, 60, 0, 80] => {}
                _ => return false,
            }
        }
    }

    async fn begin(&mut self, routing_key: &[u8], (flags, properties): &Properties, body: &[u8]) {
        let publish = [vec![0, 0], short(b"dsr.requests"), short(routing_key), vec![0]].concat();
        method(&mut self.stream, 1, 60, 40, &publish).await;
        let size = u64::try_from(body.len()).unwrap().to_be_bytes();
        let header = [&[0, 60, 0, 0], &size[..], &flags.to_be_bytes(), properties].concat();
        send(&mut self.stream, HEADER, 1, &header).await;
        if !body.is_empty() {
            send(&mut self.stream, BODY, 1, body).await;
        }
    }
}
