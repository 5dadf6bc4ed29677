//! ConnectionPermits for connections: who has one, and which is closed when there are none left.
//!
//! Owns the count and the order. Never touches a socket or a clock. The thing to know: a connection
//! may be closed until a request on it is admitted, so only admitted requests hold places; the
//! oldest goes first, of the address that has most of them.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// Each place is at a request.
    Server,
    /// Each place that this address may have is at a request.
    Address,
}

/// The places of a server. Usable from any thread; no call blocks.
pub struct ConnectionPermits {
    table: Mutex<Table<oneshot::Sender<()>>>,
}

/// A connection's place, given back when dropped.
pub struct ConnectionPermit {
    pub seat: Seat,
    /// Resolves when the place is given to somebody else.
    pub lost: oneshot::Receiver<()>,
}

/// What a connection says of itself while it has its place.
#[derive(Clone)]
pub struct Seat {
    permits: Arc<ConnectionPermits>,
    id: u64,
}

impl ConnectionPermits {
    pub fn new(places_max: usize, of_address_max: usize) -> Arc<Self> {
        Arc::new(Self { table: Mutex::new(Table::new(places_max, of_address_max)) })
    }

    /// A place for a connection from `address`. Another connection may lose its own for it.
    pub fn take(self: &Arc<Self>, address: IpAddr) -> Result<ConnectionPermit, Full> {
        let (cut, lost) = oneshot::channel();
        let (id, loser) = self.table().take(network(address), cut)?;
        tell(loser);
        Ok(ConnectionPermit { seat: Seat { permits: self.clone(), id }, lost })
    }

    /// Closes one connection that is free to be closed, if there is one.
    pub fn close_one(&self) {
        let loser = self.table().close_one();
        tell(loser);
    }

    /// Also after a panic elsewhere: each change is a few map operations.
    fn table(&self) -> MutexGuard<'_, Table<oneshot::Sender<()>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that ended by itself meanwhile has nobody to be told.
fn tell(loser: Option<oneshot::Sender<()>>) {
    if let Some(cut) = loser {
        let _ = cut.send(());
    }
}

impl Seat {
    /// A request was admitted: the connection is not closed for another one.
    pub fn hold(&self) {
        self.permits.table().hold(self.id);
    }

    /// It may be closed for another one, but all that may be by now go first.
    pub fn free(&self) {
        self.permits.table().free(self.id);
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        drop(self.seat.permits.table().leave(self.seat.id));
    }
}

/// Whoever has one IPv6 address has the 2⁶⁴ of its network.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

/// The table itself; `T` is handed back for a connection that lost its place.
struct Table<T> {
    places_max: usize,
    of_address_max: usize,
    /// Counts: the next id, and the order in which connections become free.
    next: u64,
    connections: HashMap<u64, Connection<T>>,
    addresses: HashMap<IpAddr, Address>,
    /// Addresses with free connections: how many, since when one is, and who. The last is the
    /// first to lose one.
    crowd: BTreeSet<(usize, Reverse<u64>, IpAddr)>,
}

struct Connection<T> {
    address: IpAddr,
    /// Since when it is free, if it is.
    free: Option<u64>,
    token: T,
}

#[derive(Default)]
struct Address {
    places: usize,
    /// (since when, id)
    free: BTreeSet<(u64, u64)>,
}

impl Address {
    fn rank(&self, address: IpAddr) -> Option<(usize, Reverse<u64>, IpAddr)> {
        let (since, _) = self.free.first()?;
        Some((self.free.len(), Reverse(*since), address))
    }
}

impl<T> Table<T> {
    fn new(places_max: usize, of_address_max: usize) -> Self {
        Self {
            places_max: places_max.max(1),
            of_address_max: of_address_max.max(1),
            next: 0,
            connections: HashMap::new(),
            addresses: HashMap::new(),
            crowd: BTreeSet::new(),
        }
    }

    /// A place, and the token of the one who lost it.
    fn take(&mut self, address: IpAddr, token: T) -> Result<(u64, Option<T>), Full> {
        let own = self.addresses.get(&address).map_or(0, |a| a.places);
        let loser = if own >= self.of_address_max {
            let oldest = self.addresses.get(&address).and_then(|a| a.free.first());
            Some(oldest.map(|(_, id)| *id).ok_or(Full::Address)?)
        } else if self.connections.len() >= self.places_max {
            Some(self.first_to_go().ok_or(Full::Server)?)
        } else {
            None
        };
        let lost = loser.and_then(|id| self.leave(id));
        let id = self.tick();
        self.addresses.entry(address).or_default().places += 1;
        self.connections.insert(id, Connection { address, free: None, token });
        self.free(id);
        Ok((id, lost))
    }

    fn close_one(&mut self) -> Option<T> {
        let id = self.first_to_go()?;
        self.leave(id)
    }

    fn first_to_go(&self) -> Option<u64> {
        let (_, _, address) = self.crowd.last()?;
        self.addresses.get(address)?.free.first().map(|(_, id)| *id)
    }

    fn hold(&mut self, id: u64) {
        self.place_in_order(id, None);
    }

    fn free(&mut self, id: u64) {
        let since = self.tick();
        self.place_in_order(id, Some(since));
    }

    fn tick(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Of a connection that has lost its place this says nothing any more.
    fn place_in_order(&mut self, id: u64, free: Option<u64>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let before = std::mem::replace(&mut connection.free, free);
        let address = connection.address;
        let Some(entry) = self.addresses.get_mut(&address) else { return };
        if let Some(rank) = entry.rank(address) {
            self.crowd.remove(&rank);
        }
        if let Some(before) = before {
            entry.free.remove(&(before, id));
        }
        if let Some(since) = free {
            entry.free.insert((since, id));
        }
        self.crowd.extend(entry.rank(address));
    }

    fn leave(&mut self, id: u64) -> Option<T> {
        self.hold(id);
        let connection = self.connections.remove(&id)?;
        if let Some(entry) = self.addresses.get_mut(&connection.address) {
            entry.places -= 1;
            if entry.places == 0 {
                self.addresses.remove(&connection.address);
            }
        }
        Some(connection.token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    /// Takes a place; the token is a name.
    fn take(table: &mut Table<u32>, from: u8, name: u32) -> Result<(u64, Option<u32>), Full> {
        table.take(address(from), name)
    }

    #[test]
    fn the_oldest_of_the_address_with_most_free_connections_goes_first() {
        let mut table = Table::new(6, 6);
        for (from, name) in [(1, 10), (2, 20), (3, 30), (2, 21), (2, 22), (1, 11)] {
            assert_eq!(take(&mut table, from, name).unwrap().1, None);
        }
        // 2 has three, then two as 1 has; 1's is older.
        let gone: Vec<u32> =
            (4..=8).map(|from| take(&mut table, from, 100).unwrap().1.unwrap()).collect();
        assert_eq!(gone, [20, 10, 21, 30, 22]);
    }

    #[test]
    fn a_connection_at_a_request_keeps_its_place_and_goes_to_the_end_afterwards() {
        let mut table = Table::new(3, 3);
        let ids: Vec<u64> = (0..3).map(|n| take(&mut table, 1, n).unwrap().0).collect();
        table.hold(ids[0]);
        assert_eq!(take(&mut table, 2, 3).unwrap().1, Some(1));
        table.free(ids[0]);
        assert_eq!(take(&mut table, 3, 4).unwrap().1, Some(2), "the first was heard since");
        table.hold(ids[0]);
        let held: Vec<u64> = table.connections.keys().copied().collect();
        held.into_iter().for_each(|id| table.hold(id));
        assert_eq!(take(&mut table, 9, 5), Err(Full::Server));
        table.leave(ids[0]);
        assert_eq!(take(&mut table, 9, 5).unwrap().1, None);
    }

    #[test]
    fn an_address_over_its_limit_loses_its_own() {
        let mut table = Table::new(10, 2);
        let first = take(&mut table, 1, 0).unwrap().0;
        take(&mut table, 2, 1).unwrap();
        let second = take(&mut table, 1, 2).unwrap().0;
        assert_eq!(take(&mut table, 1, 3).unwrap().1, Some(0));
        table.hold(second);
        let (third, lost) = take(&mut table, 1, 4).unwrap();
        assert_eq!(lost, Some(3));
        table.hold(third);
        assert_eq!(take(&mut table, 1, 5), Err(Full::Address));
        assert_eq!(take(&mut table, 3, 6).unwrap().1, None);
        // Whoever lost a place says nothing any more.
        table.hold(first);
        table.free(first);
        assert_eq!(table.leave(first), None);
    }

    #[test]
    fn nothing_is_left_of_those_who_left() {
        let mut table = Table::new(4, 4);
        let mut ids: Vec<u64> = Vec::new();
        for round in 0..1000u32 {
            let from = (round * 7 % 5) as u8;
            ids.push(take(&mut table, from, round).unwrap().0);
            if round % 3 == 0 {
                table.hold(ids[ids.len() / 2]);
                table.free(ids[ids.len() / 2]);
            }
            assert!(table.connections.len() <= 4);
            let free: usize = table.addresses.values().map(|a| a.free.len()).sum();
            assert_eq!(free, table.connections.len());
        }
        for id in ids {
            table.leave(id);
        }
        assert!(table.connections.is_empty() && table.addresses.is_empty());
        assert!(table.crowd.is_empty());
    }

    #[test]
    fn one_address_is_a_network_of_64_bits_in_ipv6() {
        let of = |text: &str| network(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), address(1));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }
}
