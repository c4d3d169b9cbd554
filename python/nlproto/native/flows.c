/* SPDX-License-Identifier: MIT */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "shared_proto.h"
#include "accounting.h"

_Static_assert(sizeof(struct flow) == 216, "flow");
_Static_assert(sizeof(struct port) == 96, "port");
_Static_assert(sizeof(((struct flow *)0)->comm) == SNIFFER_COMM_LEN, "comm");

#define KEY_WORDS 8
#define TCP_SYN 2
#define TCP_ACK 16

/* The key of a flow, in registers. */
struct key {
	uint64_t word[KEY_WORDS];
};

/* Packets and bytes on the wire of a record: each segment has its own headers. */
static inline void record_amount(const struct sniffer_record *r, uint64_t *packets,
				 uint64_t *bytes)
{
	*packets = r->gso_segs ? r->gso_segs : 1;
	*bytes = r->len + (*packets - 1) * r->hdr_len;
}

static inline uint64_t mixed(uint64_t value, uint64_t part, uint64_t odd)
{
	value = (value ^ part) * odd;
	return value ^ value >> 29;
}

/* Two lanes, which the processor computes at the same time. Without the seed nobody can aim. */
static inline uint64_t hash_words(const uint64_t *word, uint32_t count, uint64_t seed)
{
	uint64_t one = seed ^ 0xd6e8feb86659fd93, other = (seed << 32 | seed >> 32) + 1;

	for (uint32_t i = 0; i + 1 < count; i += 2) {
		one = mixed(one, word[i], 0x9e3779b97f4a7c15);
		other = mixed(other, word[i + 1], 0xbf58476d1ce4e5b9);
	}
	if (count & 1)
		one = mixed(one, word[count - 1], 0x94d049bb133111eb);
	one = mixed(one, other, 0xa0761d6478bd642f);
	return one * 0xe7037ed1a0b428db ^ one >> 32;
}

static inline uint64_t load64(const void *from)
{
	uint64_t value;

	memcpy(&value, from, sizeof(value));
	return value;
}

static inline int same_key(const uint64_t *one, const uint64_t *other, uint32_t words)
{
	uint64_t differs = 0;

	for (uint32_t i = 0; i < words; i++)
		differs |= one[i] ^ other[i];
	return !differs;
}

/* Any fixed order of ends will do. */
static inline int is_higher(const uint64_t *source, uint16_t sport, const uint64_t *target,
			    uint16_t dport)
{
	if (source[0] != target[0])
		return source[0] > target[0];
	if (source[1] != target[1])
		return source[1] > target[1];
	return sport > dport;
}

/* The key of a record. Returns whether the record goes out: from the local or the lower end. */
static inline int key_of_record(const struct sniffer_record *r, struct key *key)
{
	uint64_t source[2] = { load64(r->saddr), load64(r->saddr + 8) };
	uint64_t target[2] = { load64(r->daddr), load64(r->daddr + 8) };
	int forwarded = r->dir == SNIFFER_DIR_FWD;
	int swap = r->dir == SNIFFER_DIR_IN ||
		   (forwarded && is_higher(source, r->sport, target, r->dport));
	uint64_t lport = swap ? r->dport : r->sport, rport = swap ? r->sport : r->dport;

	*key = (struct key){ {
		r->cookie,
		r->start_ns,
		swap ? target[0] : source[0],
		swap ? target[1] : source[1],
		swap ? source[0] : target[0],
		swap ? source[1] : target[1],
		(uint64_t)r->tgid << 32 | r->netns,
		lport << 48 | rport << 32 | (uint64_t)r->proto << 16 | r->family << 8 | forwarded,
	} };
	return forwarded ? !swap : r->dir == SNIFFER_DIR_OUT;
}

static inline int has_key(const struct flow *flow, const struct key *key)
{
	const uint64_t *word = key->word;

	return flow->cookie == word[0] && flow->start_ns == word[1] &&
	       flow->laddr[0] == word[2] && flow->laddr[1] == word[3] &&
	       flow->raddr[0] == word[4] && flow->raddr[1] == word[5] &&
	       ((uint64_t)flow->tgid << 32 | flow->netns) == word[6] &&
	       ((uint64_t)flow->lport << 48 | (uint64_t)flow->rport << 32 |
		(uint64_t)flow->proto << 16 | flow->family << 8 | flow->forwarded) == word[7];
}

static inline void flow_begin(struct flow *flow, const struct key *key, uint64_t hash)
{
	const uint64_t *word = key->word;

	*flow = (struct flow){
		.hash = hash,
		.cookie = word[0],
		.start_ns = word[1],
		.laddr = { word[2], word[3] },
		.raddr = { word[4], word[5] },
		.tgid = (uint32_t)(word[6] >> 32),
		.netns = (uint32_t)word[6],
		.lport = (uint16_t)(word[7] >> 48),
		.rport = (uint16_t)(word[7] >> 32),
		.proto = (uint8_t)(word[7] >> 16),
		.family = (uint8_t)(word[7] >> 8),
		.forwarded = (uint8_t)word[7],
		.dirty = 1,
		.first_ns = UINT64_MAX,
	};
}

static inline void flow_add(struct flow *flow, const struct sniffer_record *r, int out)
{
	uint64_t packets, bytes;

	record_amount(r, &packets, &bytes);
	if (out) {
		flow->packets_out += packets;
		flow->bytes_out += bytes;
		flow->tcp_out |= r->tcp_flags;
	} else {
		flow->packets_in += packets;
		flow->bytes_in += bytes;
		flow->tcp_in |= r->tcp_flags;
	}
	if (r->tcp_flags & TCP_SYN && !flow->opened)
		flow->opened = (!(r->tcp_flags & TCP_ACK)) == out ? 1 : 2;
	if (r->time_ns < flow->first_ns)
		flow->first_ns = r->time_ns;
	if (r->time_ns > flow->last_ns)
		flow->last_ns = r->time_ns;
	flow->flags |= r->flags;
	flow->inode = r->inode;
	flow->uid = r->uid;
	flow->how = r->how;
	memcpy(flow->comm, r->comm, sizeof(flow->comm));
}

uint32_t flows_sum(const struct sniffer_record *records, uint32_t count, uint64_t seed,
		   struct flow *flows, uint32_t *belongs, uint32_t *slots, uint32_t bits)
{
	uint64_t mask = (1ull << bits) - 1;
	uint32_t n = 0;

	for (uint32_t i = 0; i < count; i++) {
		struct key key;
		int out = key_of_record(&records[i], &key);
		uint64_t hash = hash_words(key.word, KEY_WORDS, seed), at = hash & mask;
		uint32_t found;

		while ((found = slots[at]) && !(flows[found - 1].hash == hash &&
						has_key(&flows[found - 1], &key)))
			at = (at + 1) & mask;
		if (!found) {
			flow_begin(&flows[n], &key, hash);
			slots[at] = found = ++n;
		}
		flow_add(&flows[found - 1], &records[i], out);
		if (belongs)
			belongs[i] = found - 1;
	}
	return n;
}

uint32_t flows_processes(const struct sniffer_record *records, uint32_t count, uint64_t seed,
			 uint32_t *places, uint32_t *slots, uint32_t bits)
{
	uint64_t mask = (1ull << bits) - 1;
	uint32_t n = 0;

	for (uint32_t i = 0; i < count; i++) {
		const struct sniffer_record *r = &records[i], *known;
		uint64_t at, word[2] = { r->tgid, r->start_ns };

		if (!r->tgid)
			continue;
		for (at = hash_words(word, 2, seed) & mask; slots[at]; at = (at + 1) & mask) {
			known = &records[slots[at] - 1];
			if (known->tgid == r->tgid && known->start_ns == r->start_ns)
				break;
		}
		if (!slots[at]) {
			slots[at] = i + 1;
			places[n++] = i;
		}
	}
	return n;
}

uint32_t flows_unnamed(const struct sniffer_record *records, uint32_t count, uint32_t hows,
		       uint32_t *places)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < count; i++) {
		const struct sniffer_record *r = &records[i];

		if (!r->tgid && r->how < 32 && (hows >> r->how & 1) && r->dir != SNIFFER_DIR_FWD)
			places[n++] = i;
	}
	return n;
}

#define PORT_WORDS 5

_Static_assert(offsetof(struct port, reserved) - offsetof(struct port, address) ==
		       PORT_WORDS * sizeof(uint64_t) - 4, "port key");

static inline void port_words(const struct port *port, uint64_t *word)
{
	word[0] = port->address[0];
	word[1] = port->address[1];
	word[2] = port->start_ns;
	word[3] = (uint64_t)port->netns << 32 | port->tgid;
	word[4] = (uint64_t)port->port << 16 | (uint64_t)port->proto << 8 | port->family;
}

/* Adds the row at `ports[n]` to the others. Returns how many there are then. */
static inline uint32_t port_keep(struct port *ports, uint32_t n, uint64_t seed, uint32_t *slots,
				 uint64_t mask)
{
	struct port *new = &ports[n];
	uint64_t at, word[PORT_WORDS];

	port_words(new, word);
	new->hash = hash_words(word, PORT_WORDS, seed);
	for (at = new->hash & mask; slots[at]; at = (at + 1) & mask) {
		struct port *known = &ports[slots[at] - 1];
		uint64_t other[PORT_WORDS];

		port_words(known, other);
		if (!same_key(word, other, PORT_WORDS))
			continue;
		if (new->seen_ns >= known->seen_ns)
			*known = *new;
		return n;
	}
	slots[at] = n + 1;
	return n + 1;
}

uint32_t ports_of_flows(const struct flow *flows, uint32_t count, uint64_t seed,
			struct port *ports, uint32_t *slots, uint32_t bits)
{
	uint64_t mask = (1ull << bits) - 1;
	uint32_t n = 0;

	for (uint32_t i = 0; i < count; i++) {
		const struct flow *flow = &flows[i];
		struct port *port = &ports[n];

		if (!flow->tgid || flow->forwarded || flow->flags & SNIFFER_F_DEAD)
			continue;
		memset(port, 0, sizeof(*port));
		memcpy(port->address, flow->laddr, sizeof(port->address));
		port->start_ns = flow->start_ns;
		port->netns = flow->netns;
		port->tgid = flow->tgid;
		port->port = flow->lport;
		port->proto = flow->proto;
		port->family = flow->family;
		port->cookie = flow->cookie;
		port->seen_ns = flow->last_ns;
		port->uid = flow->uid;
		port->live = 1;
		memcpy(port->comm, flow->comm, sizeof(port->comm));
		n = port_keep(ports, n, seed, slots, mask);
	}
	return n;
}

uint32_t ports_newest(struct port *ports, uint32_t count, uint64_t seed, uint32_t *slots,
		      uint32_t bits)
{
	uint64_t mask = (1ull << bits) - 1;
	uint32_t n = 0;

	for (uint32_t i = 0; i < count; i++) {
		if (n != i)
			ports[n] = ports[i];
		n = port_keep(ports, n, seed, slots, mask);
	}
	return n;
}
