//! Which addresses and origins a guest may reach.

use serde::{Deserialize, Deserializer};
use std::net::IpAddr;
use std::str::FromStr;

/// A network, as `10.0.0.0/8`; a bare address is a network of one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cidr {
    address: IpAddr,
    bits: u8,
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no CIDR");
        let (address, bits) = text.split_once('/').map_or((text, None), |(a, b)| (a, Some(b)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(most), |bits| bits.parse().map_err(|_| wrong()))?;
        if bits > most {
            return Err(wrong());
        }
        Ok(Cidr { address, bits })
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Cidr {
    /// Whether an address is inside; an IPv4 address that is written as IPv6 counts as IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(net), IpAddr::V4(found)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0);
                u32::from(net) & mask == u32::from(found) & mask
            }
            (IpAddr::V6(net), IpAddr::V6(found)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.bits)).unwrap_or(0);
                u128::from(net) & mask == u128::from(found) & mask
            }
            _ => false,
        }
    }
}

/// Whether a list refuses an address. The unspecified address is the loopback's other name.
pub fn denied(list: &[Cidr], address: IpAddr) -> bool {
    let address = match address.to_canonical() {
        IpAddr::V4(found) if found.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
        IpAddr::V6(found) if found.is_unspecified() => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
        found => found,
    };
    list.iter().any(|network| network.contains(address))
}

/// The address in its shortest form, and the IPv4 addresses that it carries: a translator on the way may unwrap them.
/// The same judgement as `addresses.py` on the Python side.
fn forms(address: IpAddr) -> Vec<IpAddr> {
    let canonical = address.to_canonical();
    let IpAddr::V6(ip) = canonical else {
        return vec![canonical];
    };
    let number = u128::from(ip);
    let mut carried: Vec<u32> = Vec::new();
    let is_own = ip.is_loopback() || ip.is_unspecified();
    if !is_own
        && LAST_32_BITS
            .iter()
            .any(|(net, bits)| number >> (128 - bits) == *net >> (128 - bits))
    {
        carried.push(number as u32);
    }
    if ip.segments()[0] == 0x2002 {
        carried.push((number >> 80) as u32); // 6to4
    }
    if number >> 96 == 0x2001_0000 {
        carried.extend([(number >> 64) as u32, !(number as u32)]); // Teredo: server and client
    }
    if (number >> 32) as u32 & 0xfcff_ffff == 0x0000_5efe {
        carried.push(number as u32); // ISATAP
    }
    let carried = carried.into_iter().map(|number| IpAddr::from(number.to_be_bytes()));
    std::iter::once(canonical).chain(carried).collect()
}

/// IPv4-compatible, IPv4-translated, NAT64, NAT64 for local use; mapped addresses are IPv4 already.
const LAST_32_BITS: [(u128, u32); 4] = [
    (0, 96),
    (0xffff_0000 << 32, 96),
    (0x0064_ff9b << 96, 96),
    (0x0064_ff9b_0001 << 80, 48),
];

/// Metadata services of clouds that are not link-local.
const METADATA: [IpAddr; 4] = [
    IpAddr::V4(std::net::Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(std::net::Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V6(std::net::Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];

/// Loopback, link-local (cloud metadata services), multicast, broadcast and unspecified: what no origin leads to, since
/// the operator of a name's DNS would choose the target.
pub fn reserved(address: IpAddr) -> bool {
    forms(address).into_iter().any(|form| {
        METADATA.contains(&form)
            || form.is_loopback()
            || form.is_multicast()
            || form.is_unspecified()
            || match form {
                IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast() || ip.octets()[0] == 0,
                IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.segments()[0] & 0xffc0 == 0xfec0,
            }
    })
}

/// What outgoing requests may not connect to, beside reserved addresses.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    /// The node's own addresses.
    pub own: Vec<IpAddr>,
    /// The API server: names in lower case or addresses, with ports.
    pub endpoints: Vec<(String, u16)>,
    /// Kubelets' ports, on every address.
    pub ports: Vec<u16>,
    /// The operator's list.
    pub deny: Vec<Cidr>,
}

impl Guard {
    /// Whether a name may be looked up for a port.
    pub fn refuses_name(&self, host: &str, port: u16) -> bool {
        let host = host.trim_end_matches('.');
        self.ports.contains(&port)
            || host == "localhost"
            || host.ends_with(".localhost")
            || self.endpoints.iter().any(|(name, at)| *at == port && name == host)
    }

    /// Whether an address may be connected to.
    pub fn refuses_address(&self, address: IpAddr, port: u16) -> bool {
        self.ports.contains(&port)
            || reserved(address)
            || denied(&self.deny, address)
            || forms(address).into_iter().any(|form| {
                self.own.contains(&form)
                    || denied(&self.deny, form)
                    || self
                        .endpoints
                        .iter()
                        .any(|(name, at)| *at == port && *name == form.to_string())
            })
    }
}

/// Scheme, host in lower case and port of a request's target.
#[derive(Debug, Clone, PartialEq)]
pub struct Origin {
    /// HTTPS?
    pub tls: bool,
    /// Without brackets.
    pub host: String,
    /// Explicit or the scheme's own.
    pub port: u16,
}

impl Origin {
    /// Of an absolute URI; None: no http or https, or no host.
    pub fn of(uri: &http::Uri) -> Option<Origin> {
        let tls = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let authority = uri.authority()?;
        // A user before the host is refused: what the guest means by it cannot be sent, and it hides the host.
        if authority.as_str().contains('@') || authority.host().is_empty() {
            return None;
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        Some(Origin {
            tls,
            host: host.to_ascii_lowercase(),
            port: authority.port_u16().unwrap_or(if tls { 443 } else { 80 }),
        })
    }
}

/// The origins that a guest may reach.
#[derive(Debug, Default)]
pub struct Origins(Vec<Origin>);

impl Origins {
    /// An entry that is no origin allows nothing.
    pub fn new(texts: &[String]) -> Self {
        Origins(
            texts
                .iter()
                .filter_map(|text| Origin::of(&text.parse().ok()?))
                .collect(),
        )
    }

    /// Scheme, host and port must all be listed together.
    pub fn allow(&self, origin: &Origin) -> bool {
        self.0.contains(origin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    #[test]
    fn a_network_contains_its_addresses() {
        for (network, address, inside) in [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("0.0.0.0/0", "192.0.2.7", true),
            ("0.0.0.0/0", "::1", false),
            ("127.0.0.0/8", "::ffff:127.0.0.1", true),
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1/32", "192.0.2.2", false),
            ("fe80::/10", "fe80::1", true),
            ("::/0", "2001:db8::1", true),
            ("fc00::/7", "2001:db8::1", false),
        ] {
            assert_eq!(
                cidr(network).contains(address.parse().unwrap()),
                inside,
                "{network} {address}"
            );
        }
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in [
            "",
            "/",
            "x",
            "10.0.0.0/33",
            "::/129",
            "10.0.0.0/-1",
            "10.0.0.0/8/8",
            "10.0.0/8",
        ] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_unspecified_address_is_the_loopback() {
        assert!(denied(&[cidr("127.0.0.0/8")], "0.0.0.0".parse().unwrap()));
        assert!(denied(&[cidr("::1")], "::".parse().unwrap()));
    }

    #[test]
    fn an_address_is_judged_in_all_its_spellings() {
        let guard = Guard {
            own: vec!["192.0.2.9".parse().unwrap()],
            endpoints: vec![("198.51.100.1".into(), 6443), ("api.example".into(), 6443)],
            ports: vec![10250],
            deny: vec![cidr("10.96.0.0/12")],
        };
        for (address, port, refused) in [
            ("127.0.0.1", 80, true),
            ("169.254.169.254", 80, true),
            ("0.1.2.3", 80, true),
            ("255.255.255.255", 80, true),
            ("100.100.100.200", 80, true),
            ("fd00:ec2::254", 80, true),
            ("::1", 80, true),
            ("::ffff:127.0.0.1", 80, true),
            ("::127.0.0.1", 80, true),
            ("64:ff9b::7f00:1", 80, true),
            ("64:ff9b:1::a9fe:a9fe", 80, true),
            ("2002:7f00:1::1", 80, true),
            ("2001:0:7f00:1::", 80, true),
            ("fe80::5efe:127.0.0.1", 80, true),
            ("2001:db8::5efe:127.0.0.1", 80, true),
            ("fec0::1", 80, true),
            ("192.0.2.9", 80, true),
            ("::ffff:192.0.2.9", 80, true),
            ("198.51.100.1", 6443, true),
            ("198.51.100.1", 443, false),
            ("203.0.113.1", 10250, true),
            ("10.97.0.1", 80, true),
            ("64:ff9b::a61:1", 80, true),
            ("203.0.113.1", 80, false),
            ("10.0.0.1", 80, false),
            ("2001:db8::1", 80, false),
        ] {
            assert_eq!(
                guard.refuses_address(address.parse().unwrap(), port),
                refused,
                "{address}:{port}"
            );
        }
        for (name, port, refused) in [
            ("api.example.", 6443, true),
            ("api.example", 443, false),
            ("localhost", 80, true),
            ("a.localhost", 80, true),
            ("b.example", 10250, true),
        ] {
            assert_eq!(guard.refuses_name(name, port), refused, "{name}:{port}");
        }
    }

    #[test]
    fn an_origin_is_compared_whole() {
        let allowed = Origins::new(&[
            "https://API.example".into(),
            "http://[::1]:8080".into(),
            "ftp://x".into(),
        ]);
        for (uri, reached) in [
            ("https://api.example/any?x", true),
            ("https://api.example:443/", true),
            ("https://api.example:444/", false),
            ("http://api.example/", false),
            ("https://api.example.evil/", false),
            ("https://user@api.example/", false),
            ("http://[::1]:8080/", true),
            ("ftp://x/", false),
        ] {
            let found = Origin::of(&uri.parse().unwrap());
            assert_eq!(found.is_some_and(|origin| allowed.allow(&origin)), reached, "{uri}");
        }
    }
}
