//! As much of HTTP/2 and gRPC as a health check asks for: each call of a connection is taken for `Check`.

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;
const PADDED: u8 = 8;
const NOT_FOUND: &str = "5";
const OK: &str = "0";
/// `:status: 200` of HPACK's static table.
const STATUS_200: u8 = 0x88;

#[derive(Default)]
pub struct Session {
    greeted: bool,
    calls: Vec<(u32, Vec<u8>)>,
}

fn frame(sort: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = payload.len() as u32;
    let mut out = length.to_be_bytes()[1..].to_vec();
    out.extend([sort, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// A header that no table holds, both texts shorter than 127 bytes.
fn literal(name: &str, value: &str) -> Vec<u8> {
    let mut out = vec![0, name.len() as u8];
    out.extend(name.as_bytes());
    out.push(value.len() as u8);
    out.extend(value.as_bytes());
    out
}

/// `HealthCheckRequest.service`: field 1 of the message behind gRPC's five bytes.
fn service(body: &[u8]) -> String {
    match body.get(5..) {
        Some([0x0a, length, rest @ ..]) => {
            String::from_utf8_lossy(&rest[..rest.len().min(*length as usize)]).into_owned()
        }
        _ => String::new(),
    }
}

impl Session {
    /// Take whole frames from `data` and return what is to be sent; None: this is no HTTP/2, or the client leaves.
    pub fn turn(&mut self, data: &mut Vec<u8>, state: &dyn Fn(&str) -> Option<bool>) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        if !self.greeted {
            if data.len() < PREFACE.len() {
                return if PREFACE.starts_with(data) { Some(out) } else { None };
            }
            if !data.starts_with(PREFACE) {
                return None;
            }
            data.drain(..PREFACE.len());
            self.greeted = true;
            out.extend(frame(SETTINGS, 0, 0, &[]));
        }
        while data.len() >= 9 {
            let length = u32::from_be_bytes([0, data[0], data[1], data[2]]) as usize;
            if data.len() < 9 + length {
                break;
            }
            let (sort, flags) = (data[3], data[4]);
            let stream = u32::from_be_bytes([data[5] & 0x7f, data[6], data[7], data[8]]);
            let payload: Vec<u8> = data[9..9 + length].to_vec();
            data.drain(..9 + length);
            match sort {
                SETTINGS if flags & ACK == 0 => out.extend(frame(SETTINGS, ACK, 0, &[])),
                PING if flags & ACK == 0 => out.extend(frame(PING, ACK, 0, &payload)),
                GOAWAY => return None,
                HEADERS => self.calls.push((stream, Vec::new())),
                DATA => {
                    let padding = if flags & PADDED == 0 { 0 } else { *payload.first()? as usize };
                    let content = payload.get(usize::from(flags & PADDED != 0)..payload.len().checked_sub(padding)?)?;
                    if let Some((_, body)) = self.calls.iter_mut().find(|(id, _)| *id == stream) {
                        body.extend(content);
                    }
                }
                _ => {}
            }
            if (sort == DATA || sort == HEADERS) && flags & END_STREAM != 0 {
                if let Some(at) = self.calls.iter().position(|(id, _)| *id == stream) {
                    let (_, body) = self.calls.remove(at);
                    out.extend(answer(stream, state(&service(&body))));
                }
            }
        }
        Some(out)
    }
}

fn answer(stream: u32, serving: Option<bool>) -> Vec<u8> {
    let mut head = vec![STATUS_200];
    head.extend(literal("content-type", "application/grpc"));
    let serving = match serving {
        Some(serving) => serving,
        None => {
            head.extend(literal("grpc-status", NOT_FOUND));
            head.extend(literal("grpc-message", "unknown service"));
            return frame(HEADERS, END_HEADERS | END_STREAM, stream, &head);
        }
    };
    let mut out = frame(HEADERS, END_HEADERS, stream, &head);
    // One uncompressed message of two bytes: field 1, SERVING or NOT_SERVING.
    out.extend(frame(DATA, 0, stream, &[0, 0, 0, 0, 2, 0x08, if serving { 1 } else { 2 }]));
    out.extend(frame(HEADERS, END_HEADERS | END_STREAM, stream, &literal("grpc-status", OK)));
    out
}
