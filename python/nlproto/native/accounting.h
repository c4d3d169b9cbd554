/* SPDX-License-Identifier: MIT */
/*
 * accounting.h - records summed up and kept, whole batches at a time, as arrays for NumPy.
 *
 * Both cffi and the compiler read this file: plain declarations only. All memory is the
 * caller's, and no function keeps a pointer or other state. The owner of an array may
 * call from any thread, and must lock arrays that threads share. Calls run without
 * Python's lock.
 */

/*
 * A flow of one owner (nlproto.tables.flows.FLOW). The fields from cookie to zero are
 * its key. Tables store the fields of one paragraph side by side, because they are used
 * together.
 */
struct flow {
	uint64_t hash;		/* of the key */

	uint64_t cookie;
	uint64_t start_ns;
	uint32_t tgid;
	uint32_t netns;

	uint64_t laddr[2];	/* 16 bytes in network order, seen as two numbers */
	uint64_t raddr[2];

	uint16_t lport;
	uint16_t rport;
	uint8_t proto;
	uint8_t family;
	uint8_t forwarded;
	uint8_t zero;

	uint64_t inode;		/* of the last record, as are uid, how and comm */
	uint32_t uid;
	uint16_t flags;		/* all that were ever set */
	uint8_t how;
	uint8_t dirty;		/* 1; until a store has taken it */
	char comm[16];
	uint64_t domain;	/* of the far end's name (nlproto.overheard.names), 0: none */

	uint64_t nat_laddr[2];	/* what NAT made of both ends, 0: nothing is known */
	uint64_t nat_raddr[2];
	uint16_t nat_lport;
	uint16_t nat_rport;
	uint32_t nat_zero;

	uint64_t packets_in;
	uint64_t bytes_in;
	uint64_t packets_out;
	uint64_t bytes_out;

	uint64_t first_ns;
	uint64_t last_ns;

	uint32_t rtt_us;	/* smoothed by the kernel, as of the last look; 0: unknown */
	uint32_t retransmits;	/* segments; unknown unless flags has FLOW_LOOKED */
	uint8_t tcp_in;		/* TCP flags of all packets that came in */
	uint8_t tcp_out;	/* and that went out */
	uint8_t opened;		/* SYN of: 1 this (or the lower) end, 2 the other, 0 none seen */
	uint8_t reserved[5];
};

/*
 * Sum up `count` records. `flows` has room for as many, `slots` is zeroed and has
 * 2^bits > count elements. Returns how many flows there are, in order of appearance;
 * belongs[i], unless NULL, is the number of record i's flow.
 */
uint32_t flows_sum(const struct sniffer_record *records, uint32_t count, uint64_t seed,
		   struct flow *flows, uint32_t *belongs, uint32_t *slots, uint32_t bits);

/* Finds the first record of each process (tgid, start_ns); `slots` as in flows_sum(). */
uint32_t flows_processes(const struct sniffer_record *records, uint32_t count, uint64_t seed,
			 uint32_t *places, uint32_t *slots, uint32_t bits);

/* Finds the unnamed, not forwarded records whose `how` is one of the bits of `hows`. */
uint32_t flows_unnamed(const struct sniffer_record *records, uint32_t count, uint32_t hows,
		       uint32_t *places);

/*
 * An owner of a local end (nlproto.tables.portmap). The fields from address to family
 * are its key.
 */
struct port {
	uint64_t hash;

	uint64_t address[2];
	uint64_t start_ns;
	uint32_t netns;
	uint32_t tgid;
	uint16_t port;
	uint8_t proto;
	uint8_t family;
	uint32_t reserved;

	uint64_t cookie;
	uint64_t seen_ns;
	uint32_t uid;
	uint8_t listening;
	uint8_t reserved2[3];
	char comm[16];

	uint8_t live;		/* 1: the row is in use */
	uint8_t reserved3[7];
};

/*
 * Finds the owners of the local ends of `flows`, each once, from its last flow.
 * Forwarded, unnamed and closed flows are left out. `ports` and `slots` as in
 * flows_sum().
 */
uint32_t ports_of_flows(const struct flow *flows, uint32_t count, uint64_t seed,
			struct port *ports, uint32_t *slots, uint32_t bits);

/* The same for ports: each key once, as it was last seen. Fills in hashes, in place. */
uint32_t ports_newest(struct port *ports, uint32_t count, uint64_t seed, uint32_t *slots,
		      uint32_t bits);

/* Some fields of all rows of a table, side by side. */
struct table_column {
	uint8_t *data;
	uint32_t width;		/* bytes of a row */
	uint32_t given;		/* of these, from the first on: those that values have */
	uint32_t field;		/* offset in a value */
	uint32_t compared;	/* of these: those of the key */
};

/* Columns whose rows are found by a hash. */
struct table {
	struct table_column *columns;
	uint32_t column_count;
	uint32_t value_size;	/* bytes from one value to the next */
	uint32_t value_hash;	/* offset of the hash in a value */
	uint32_t slot_bits;
	uint32_t *hashes;	/* lower halves of rows' hashes: keys are compared too */
	uint32_t *slots;	/* 2^slot_bits: row + 1, 0: none */
};

/* Sets rows[i] to the row with the key of value i, or -1. */
void table_find(const struct table *table, const uint8_t *values, uint32_t count, int64_t *rows);

/* Writes values to rows, which can then be found. There must be free slots. */
void table_put(const struct table *table, const uint8_t *values, uint32_t count,
	       const int64_t *rows);

/* Takes these rows out of the index. Returns how many of them were in it. */
uint32_t table_remove(const struct table *table, const int64_t *rows, uint32_t count);

/* Moves rows with keep[i] to the front, in order. The index is invalid afterwards. */
uint32_t table_keep(const struct table *table, const uint8_t *keep, uint32_t count);

/* Enters these rows into the index. There must be free slots. */
void table_enter(const struct table *table, const int64_t *rows, uint32_t count);

/* Columns of nlproto.tables.portmap as struct port has them. */
struct portmap_key {
	uint64_t address[2];
	uint64_t start_ns;
	uint32_t netns;
	uint32_t tgid;
	uint16_t port;
	uint8_t proto;
	uint8_t family;
	uint32_t reserved;
};

struct portmap_state {
	uint64_t cookie;
	uint64_t seen_ns;
	uint32_t uid;
	uint8_t listening;
	uint8_t reserved2[3];
	char comm[16];
};

/* The rows of one port are a ring. */
struct portmap_ring {
	uint32_t next;
	uint32_t previous;
};

struct portmap {
	struct portmap_key *keys;
	struct portmap_state *states;
	struct portmap_ring *rings;
	uint32_t *heads;	/* 65536: row + 1, 0: none */
	uint32_t *counts;	/* 65536 */
};

/* Updates rows (-1: none) by what is known now. */
void portmap_renew(const struct portmap *map, const struct port *ports, uint32_t count,
		   const int64_t *rows);

/* Puts rows into the rings of their ports, and takes them out. */
void portmap_link(const struct portmap *map, const int64_t *rows, uint32_t count);
void portmap_unlink(const struct portmap *map, const int64_t *rows, uint32_t count);

/* The counts[port] rows of a port. */
void portmap_rows(const struct portmap *map, uint16_t port, int64_t *rows);

/* Columns of daemon.history.memory, as in struct flow but for the times. */
struct history_last {
	uint64_t inode;
	uint32_t uid;
	uint16_t flags;
	uint8_t how;
	uint8_t dirty;
	char comm[16];
	uint64_t domain;
};

struct history_nat {
	uint64_t nat_laddr[2];
	uint64_t nat_raddr[2];
	uint16_t nat_lport;
	uint16_t nat_rport;
	uint32_t nat_zero;
};

struct history_sums {
	uint64_t packets_in;
	uint64_t bytes_in;
	uint64_t packets_out;
	uint64_t bytes_out;
};

struct history_times {
	uint64_t first_ns;	/* since 1970 */
	uint64_t last_ns;
	uint64_t heard_ns;	/* last_ns by CLOCK_MONOTONIC, which nobody can set */
};

struct history_tcp {
	uint32_t rtt_us;
	uint32_t retransmits;
	uint8_t tcp_in;
	uint8_t tcp_out;
	uint8_t reserved[6];
};

struct history {
	struct history_last *last;
	struct history_nat *nat;
	struct history_sums *sums;
	struct history_times *times;
	struct history_tcp *tcp;
};

/* Adds flows to their rows (-1: to none). `real` converts their times to the time of day. */
void history_add(const struct history *history, const struct flow *flows, uint32_t count,
		 const int64_t *rows, uint64_t real);

/*
 * goes[i] = 1 for the rows that go so that rows of weight `keep` stay (nlproto.tables.shares.surplus).
 * `groups`: group_count arrays of `count`, one behind the other. 0, or -1 when memory is short.
 */
int shares_surplus(const int64_t *age, const uint64_t *groups, uint32_t group_count,
		   const int64_t *weights, uint32_t count, int64_t keep, uint64_t seed,
		   uint8_t *goes);
