/* SPDX-License-Identifier: MIT */
/*
 * accounting.h - records summed up and kept, whole batches at a time, as arrays for NumPy.
 *
 * cffi reads this file as well as the compiler: plain declarations only. All memory is the
 * caller's. No function keeps a pointer or any state of its own: who owns an array may call from
 * any thread, and locks what threads share. Calls run without Python's lock.
 */

/*
 * A flow of one owner (nlproto.tables.flows.FLOW). From cookie to zero it is what makes two different.
 * Tables keep what stands in one paragraph side by side: it is used together.
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
	uint16_t flags;		/* all that were set */
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

	uint32_t rtt_us;	/* the kernel's smoothed one, as last looked at; 0: none known */
	uint32_t retransmits;	/* segments; nothing is known unless flags has FLOW_LOOKED */
	uint8_t tcp_in;		/* TCP flags of all packets that came in */
	uint8_t tcp_out;	/* and that went out */
	uint8_t opened;		/* who sent the SYN: 1 this (or the lower) end, 2 the other one, 0: not seen */
	uint8_t reserved[5];
};

/*
 * Sum up `count` records. `flows` has room for as many, `slots` is zeroed and has 2^bits > count
 * elements. Returns how many flows there are, in order of appearance; belongs[i], unless NULL, is
 * that of record i.
 */
uint32_t flows_sum(const struct sniffer_record *records, uint32_t count, uint64_t seed,
		   struct flow *flows, uint32_t *belongs, uint32_t *slots, uint32_t bits);

/* The places of the first record of each process (tgid, start_ns); `slots` as in flows_sum(). */
uint32_t flows_processes(const struct sniffer_record *records, uint32_t count, uint64_t seed,
			 uint32_t *places, uint32_t *slots, uint32_t bits);

/* The places of unnamed, not forwarded records whose `how` is one of the bits of `hows`. */
uint32_t flows_unnamed(const struct sniffer_record *records, uint32_t count, uint32_t hows,
		       uint32_t *places);

/* An owner of a local end (nlproto.tables.portmap). From address to family it is the key. */
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
 * The owners of the local ends of `flows`, each once, as its last flow has it. Forwarded, unnamed
 * and closed ones tell nothing. `ports` and `slots` as in flows_sum().
 */
uint32_t ports_of_flows(const struct flow *flows, uint32_t count, uint64_t seed,
			struct port *ports, uint32_t *slots, uint32_t bits);

/* The same of ports: each key once, as the one last seen has it; hashes are filled in. In place. */
uint32_t ports_newest(struct port *ports, uint32_t count, uint64_t seed, uint32_t *slots,
		      uint32_t bits);

/* Some fields of all rows of a table, side by side. */
struct table_column {
	uint8_t *data;
	uint32_t width;		/* bytes of a row */
	uint32_t given;		/* of these, from the first on: values have them */
	uint32_t field;		/* where in a value */
	uint32_t compared;	/* of these: they are the key */
};

/* Columns in which rows are found by a hash. */
struct table {
	struct table_column *columns;
	uint32_t column_count;
	uint32_t value_size;	/* bytes from one value to the next */
	uint32_t value_hash;	/* where values have their hash */
	uint32_t slot_bits;
	uint32_t *hashes;	/* of rows: the lower half is enough, keys are compared */
	uint32_t *slots;	/* 2^slot_bits: row + 1, 0: none */
};

/* rows[i] is where the key of value i is, or -1. */
void table_find(const struct table *table, const uint8_t *values, uint32_t count, int64_t *rows);

/* Write values to rows, which are then found. There must be free slots. */
void table_put(const struct table *table, const uint8_t *values, uint32_t count,
	       const int64_t *rows);

/* These rows are found no more; returns how many of them were. */
uint32_t table_remove(const struct table *table, const int64_t *rows, uint32_t count);

/* Rows with keep[i] become the first, in their order. The index is no more right. */
uint32_t table_keep(const struct table *table, const uint8_t *keep, uint32_t count);

/* These rows are found from now on. There must be free slots. */
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

/* Renew rows (-1: none) by what is known now. */
void portmap_renew(const struct portmap *map, const struct port *ports, uint32_t count,
		   const int64_t *rows);

/* Put rows into the rings of their ports, and take them out. */
void portmap_link(const struct portmap *map, const int64_t *rows, uint32_t count);
void portmap_unlink(const struct portmap *map, const int64_t *rows, uint32_t count);

/* The counts[port] rows of a port. */
void portmap_rows(const struct portmap *map, uint16_t port, int64_t *rows);

/* Columns of daemon.history.memory as struct flow has them, but for the times. */
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
	uint64_t heard_ns;	/* last_ns by CLOCK_MONOTONIC, which nobody sets */
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

/* Add flows to their rows (-1: to none); `real` is what makes a time of day of theirs. */
void history_add(const struct history *history, const struct flow *flows, uint32_t count,
		 const int64_t *rows, uint64_t real);

/*
 * goes[i] = 1 for the rows that go so that rows of weight `keep` stay (nlproto.tables.shares.surplus).
 * `groups`: group_count arrays of `count`, one behind the other. 0, or -1 when memory is short.
 */
int shares_surplus(const int64_t *age, const uint64_t *groups, uint32_t group_count,
		   const int64_t *weights, uint32_t count, int64_t keep, uint64_t seed,
		   uint8_t *goes);
