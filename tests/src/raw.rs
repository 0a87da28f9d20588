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
    stream.write_all(&frame).await.unwrap();
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

/// Publishes to `dsr.requests` with a `correlation_id` of any bytes, and waits for the confirm.
pub async fn publish(world: &World, routing_key: &str, correlation_id: &[u8], body: &[u8]) {
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
    let publish = [vec![0, 0], short(b"dsr.requests"), short(routing_key.as_bytes()), vec![0]].concat();
    method(&mut stream, 1, 60, 40, &publish).await;
    // Persistent, and the correlation id.
    let size = u64::try_from(body.len()).unwrap().to_be_bytes();
    let properties = [vec![0x14, 0x00, 2], short(correlation_id)].concat();
    let header = [&[0, 60, 0, 0], size.as_slice(), &properties].concat();
    send(&mut stream, HEADER, 1, &header).await;
    send(&mut stream, BODY, 1, body).await;
    expect(&mut stream, 60, 80).await;
}
