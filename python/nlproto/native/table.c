/* SPDX-License-Identifier: MIT */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "shared_proto.h"
#include "accounting.h"

static int has_key(const struct table *t, size_t row, const uint8_t *value)
{
	for (uint32_t i = 0; i < t->column_count; i++) {
		const struct table_column *c = &t->columns[i];

		if (c->compared && memcmp(c->data + row * c->width, value + c->field, c->compared))
			return 0;
	}
	return 1;
}

static inline uint32_t hash_of(const struct table *t, const uint8_t *value)
{
	uint64_t hash;

	memcpy(&hash, value + t->value_hash, sizeof(hash));
	return (uint32_t)hash;
}

void table_find(const struct table *t, const uint8_t *values, uint32_t count, int64_t *rows)
{
	uint64_t mask = (1ull << t->slot_bits) - 1;

	for (uint32_t i = 0; i < count; i++) {
		const uint8_t *value = values + (size_t)i * t->value_size;
		uint32_t hash = hash_of(t, value);
		uint64_t at;

		rows[i] = -1;
		for (at = hash & mask; t->slots[at]; at = (at + 1) & mask) {
			uint32_t row = t->slots[at] - 1;

			if (t->hashes[row] == hash && has_key(t, row, value)) {
				rows[i] = row;
				break;
			}
		}
	}
}

static inline void enter(const struct table *t, uint64_t mask, uint32_t row)
{
	uint64_t at = t->hashes[row] & mask;

	while (t->slots[at])
		at = (at + 1) & mask;
	t->slots[at] = row + 1;
}

void table_put(const struct table *t, const uint8_t *values, uint32_t count, const int64_t *rows)
{
	uint64_t mask = (1ull << t->slot_bits) - 1;

	for (uint32_t column = 0; column < t->column_count; column++) {
		const struct table_column *c = &t->columns[column];
		const uint8_t *from = values + c->field;

		for (uint32_t i = 0; c->given && i < count; i++, from += t->value_size) {
			uint8_t *to = c->data + (size_t)rows[i] * c->width;

			/* zeros that nobody has written to take no memory */
			if (memcmp(to, from, c->given))
				memcpy(to, from, c->given);
		}
	}
	for (uint32_t i = 0; i < count; i++) {
		t->hashes[rows[i]] = hash_of(t, values + (size_t)i * t->value_size);
		enter(t, mask, (uint32_t)rows[i]);
	}
}

/* Frees a slot, and moves up later ones that would no longer be found. */
static void slot_free(const struct table *t, uint64_t mask, uint64_t hole)
{
	uint64_t at = hole;

	for (;;) {
		at = (at + 1) & mask;
		if (!t->slots[at])
			break;
		uint64_t home = t->hashes[t->slots[at] - 1] & mask;

		if (((at - home) & mask) >= ((at - hole) & mask)) {
			t->slots[hole] = t->slots[at];
			hole = at;
		}
	}
	t->slots[hole] = 0;
}

uint32_t table_remove(const struct table *t, const int64_t *rows, uint32_t count)
{
	uint64_t mask = (1ull << t->slot_bits) - 1;
	uint32_t n = 0;

	for (uint32_t i = 0; i < count; i++) {
		uint32_t wanted = (uint32_t)rows[i] + 1;
		uint64_t at = t->hashes[rows[i]] & mask;

		while (t->slots[at] && t->slots[at] != wanted)
			at = (at + 1) & mask;
		if (t->slots[at]) {
			slot_free(t, mask, at);
			n++;
		}
	}
	return n;
}

/* Moves runs of kept rows to the front of a column. Returns how many rows they have. */
static uint32_t keep_runs(uint8_t *data, uint32_t width, const uint8_t *keep, uint32_t count)
{
	const uint8_t *end = keep + count, *begin = keep, *stop;
	uint32_t n = 0;

	while (begin < end && (begin = memchr(begin, 1, (size_t)(end - begin)))) {
		stop = memchr(begin, 0, (size_t)(end - begin));
		stop = stop ? stop : end;
		memmove(data + (size_t)n * width, data + (size_t)(begin - keep) * width,
			(size_t)(stop - begin) * width);
		n += (uint32_t)(stop - begin);
		begin = stop;
	}
	return n;
}

uint32_t table_keep(const struct table *t, const uint8_t *keep, uint32_t count)
{
	uint32_t n = 0;

	for (uint32_t column = 0; column < t->column_count; column++)
		n = keep_runs(t->columns[column].data, t->columns[column].width, keep, count);
	keep_runs((uint8_t *)t->hashes, sizeof(*t->hashes), keep, count);
	return n;
}

void table_enter(const struct table *t, const int64_t *rows, uint32_t count)
{
	uint64_t mask = (1ull << t->slot_bits) - 1;

	for (uint32_t i = 0; i < count; i++)
		enter(t, mask, (uint32_t)rows[i]);
}

_Static_assert(sizeof(struct portmap_key) ==
		       offsetof(struct port, cookie) - offsetof(struct port, address), "key");
_Static_assert(sizeof(struct portmap_state) ==
		       offsetof(struct port, live) - offsetof(struct port, cookie), "state");

void portmap_renew(const struct portmap *map, const struct port *ports, uint32_t count,
		   const int64_t *rows)
{
	for (uint32_t i = 0; i < count; i++) {
		const struct port *new = &ports[i];
		struct portmap_state *state;

		if (rows[i] < 0)
			continue;
		state = &map->states[rows[i]];
		/* a connection accepted on the listener's address does not replace the listener */
		if (new->cookie && !(state->listening && !new->listening && state->cookie))
			state->cookie = new->cookie;
		if (new->comm[0])
			memcpy(state->comm, new->comm, sizeof(state->comm));
		state->uid = new->uid;
		state->listening |= new->listening;
		if (new->seen_ns > state->seen_ns)
			state->seen_ns = new->seen_ns;
	}
}

void portmap_link(const struct portmap *map, const int64_t *rows, uint32_t count)
{
	struct portmap_ring *rings = map->rings;

	for (uint32_t i = 0; i < count; i++) {
		uint32_t row = (uint32_t)rows[i], head = row, last = row;
		uint16_t port = map->keys[row].port;

		if (map->heads[port]) {
			head = map->heads[port] - 1;
			last = rings[head].previous;
			rings[last].next = row;
			rings[head].previous = row;
		} else {
			map->heads[port] = row + 1;
		}
		rings[row] = (struct portmap_ring){ head, last };
		map->counts[port]++;
	}
}

void portmap_unlink(const struct portmap *map, const int64_t *rows, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		uint32_t row = (uint32_t)rows[i];
		struct portmap_ring ring = map->rings[row];
		uint16_t port = map->keys[row].port;

		map->rings[ring.previous].next = ring.next;
		map->rings[ring.next].previous = ring.previous;
		if (map->heads[port] == row + 1)
			map->heads[port] = ring.next == row ? 0 : ring.next + 1;
		map->counts[port]--;
	}
}

void portmap_rows(const struct portmap *map, uint16_t port, int64_t *rows)
{
	uint32_t row = map->heads[port] - 1;

	for (uint32_t i = 0; i < map->counts[port]; i++) {
		rows[i] = row;
		row = map->rings[row].next;
	}
}

_Static_assert(sizeof(struct history_last) ==
		       offsetof(struct flow, nat_laddr) - offsetof(struct flow, inode), "last");
_Static_assert(sizeof(struct history_nat) ==
		       offsetof(struct flow, packets_in) - offsetof(struct flow, nat_laddr), "nat");
_Static_assert(sizeof(struct history_tcp) == sizeof(struct flow) - offsetof(struct flow, rtt_us),
	       "tcp");
_Static_assert(sizeof(struct history_sums) ==
		       offsetof(struct flow, first_ns) - offsetof(struct flow, packets_in), "sums");

void history_add(const struct history *h, const struct flow *flows, uint32_t count,
		 const int64_t *rows, uint64_t real)
{
	for (uint32_t i = 0; i < count; i++) {
		const struct flow *f = &flows[i];
		struct history_times *times;
		struct history_last *last;
		struct history_sums *sums;

		if (rows[i] < 0)
			continue;
		sums = &h->sums[rows[i]];
		sums->packets_in += f->packets_in;
		sums->bytes_in += f->bytes_in;
		sums->packets_out += f->packets_out;
		sums->bytes_out += f->bytes_out;
		times = &h->times[rows[i]];
		last = &h->last[rows[i]];
		if (f->first_ns + real < times->first_ns)
			times->first_ns = f->first_ns + real;
		if (f->last_ns >= times->heard_ns) {
			times->heard_ns = f->last_ns;
			times->last_ns = f->last_ns + real;
			last->inode = f->inode;
			last->uid = f->uid;
			last->how = f->how;
			memcpy(last->comm, f->comm, sizeof(last->comm));
		}
		/* the time of day may have been set back meanwhile */
		if (times->first_ns > times->last_ns)
			times->first_ns = times->last_ns;
		last->flags |= f->flags;
		if (f->domain)
			last->domain = f->domain;
		if (f->nat_lport)
			memcpy(&h->nat[rows[i]], f->nat_laddr, sizeof(*h->nat));
		h->tcp[rows[i]].tcp_in |= f->tcp_in;
		h->tcp[rows[i]].tcp_out |= f->tcp_out;
		last->dirty = 1;
	}
}

struct item {
	uint64_t key;
	uint64_t row;
};

#define DIGIT 11
#define BUCKETS (1u << DIGIT)

/* Stable sort by key. Returns where the result is: in `items` or in `spare`. */
static struct item *sort(struct item *items, struct item *spare, uint32_t count)
{
	for (uint32_t shift = 0; shift < 64; shift += DIGIT) {
		uint32_t starts[BUCKETS] = { 0 }, sum = 0;
		struct item *swap = items;

		for (uint32_t i = 0; i < count; i++)
			starts[items[i].key >> shift & (BUCKETS - 1)]++;
		if (starts[items[0].key >> shift & (BUCKETS - 1)] == count)
			continue;
		for (uint32_t i = 0; i < BUCKETS; i++) {
			uint32_t here = starts[i];

			starts[i] = sum;
			sum += here;
		}
		for (uint32_t i = 0; i < count; i++)
			spare[starts[items[i].key >> shift & (BUCKETS - 1)]++] = items[i];
		items = spare;
		spare = swap;
	}
	return items;
}

struct sum {
	uint64_t group;
	uint64_t weight;
	uint64_t used;
};

/* A sum for each group; a hash finds the group. */
struct sums {
	struct sum *slots;
	uint64_t mask;
	uint64_t used;
	uint64_t seed;
};

static struct sum *sum_of(const struct sums *s, uint64_t group)
{
	uint64_t at = (group ^ s->seed) * 0x9e3779b97f4a7c15;

	at = (at ^ at >> 32 ^ s->seed) * 0xbf58476d1ce4e5b9;
	for (at = (at ^ at >> 32) & s->mask; s->slots[at].used; at = (at + 1) & s->mask) {
		if (s->slots[at].group == group)
			break;
	}
	return &s->slots[at];
}

/* Makes room for another group. 0, or -1 without memory. */
static int sums_grow(struct sums *s)
{
	struct sums old = *s;

	if (2 * old.used < old.mask)
		return 0;
	s->mask = old.mask * 2 + 1;
	s->slots = calloc(s->mask + 1, sizeof(*s->slots));
	if (!s->slots) {
		*s = old;
		return -1;
	}
	for (uint64_t i = 0; i <= old.mask; i++) {
		if (old.slots[i].used)
			*sum_of(s, old.slots[i].group) = old.slots[i];
	}
	free(old.slots);
	return 0;
}

static inline uint64_t weight_of(const int64_t *weights, uint64_t row)
{
	return weights ? (uint64_t)weights[row] : 1;
}

/*
 * Sets places[row] to the weight of its group up to this row, in the order given.
 * Returns how many groups there are, or -1 without memory.
 */
static int64_t place_in_group(const struct item *in_order, uint32_t count, const uint64_t *group,
			  const int64_t *weights, uint64_t seed, uint64_t *places)
{
	struct sums sums = { calloc(256, sizeof(*sums.slots)), 255, 0, seed };
	int failed = !sums.slots;

	for (uint32_t i = 0; i < count && !failed; i++) {
		uint64_t row = in_order[i].row;
		struct sum *sum = sum_of(&sums, group[row]);

		places[row] = sum->weight += weight_of(weights, row);
		if (!sum->used) {
			sum->used = 1;
			sum->group = group[row];
			sums.used++;
			failed = sums_grow(&sums);
		}
	}
	free(sums.slots);
	return failed ? -1 : (int64_t)sums.used;
}

/* The rows to remove. `items` has room for three times as many items, `places` for as many. */
static int choose(const int64_t *age, const uint64_t *groups, uint32_t group_count,
		  const int64_t *weights, uint32_t count, int64_t keep, uint64_t seed,
		  struct item *items, uint64_t *places, uint8_t *goes)
{
	struct item *by_age = items + count, *spare = by_age + count, *in_order;
	uint64_t left = (uint64_t)keep;

	for (uint32_t i = 0; i < count; i++)
		items[i] = (struct item){ (uint64_t)age[i] ^ 1ull << 63, i };
	in_order = sort(items, spare, count);
	memcpy(by_age, in_order, count * sizeof(*items));
	while (group_count--) {		/* the finest groups first */
		int64_t found = place_in_group(in_order, count,
					       groups + (size_t)group_count * count, weights,
					       seed, places);

		if (found < 0)
			return -1;
		if (found == 1 && !weights)	/* they are in order of their places */
			continue;
		for (uint32_t i = 0; i < count; i++)
			items[i] = (struct item){ places[by_age[i].row], by_age[i].row };
		in_order = sort(items, spare, count);
	}
	memset(goes, 1, count);
	if (keep < 0)
		return 0;
	for (uint32_t i = 0; i < count; i++) {
		uint64_t weight = weight_of(weights, in_order[i].row);

		if (weight > left)
			break;
		left -= weight;
		goes[in_order[i].row] = 0;
	}
	return 0;
}

int shares_surplus(const int64_t *age, const uint64_t *groups, uint32_t group_count,
		   const int64_t *weights, uint32_t count, int64_t keep, uint64_t seed,
		   uint8_t *goes)
{
	struct item *items = malloc(3 * (size_t)count * sizeof(*items) + 1);
	uint64_t *places = malloc(count * sizeof(*places) + 1);
	int result = -1;

	if (items && places)
		result = count ? choose(age, groups, group_count, weights, count, keep, seed,
					items, places, goes) : 0;
	free(items);
	free(places);
	return result;
}
