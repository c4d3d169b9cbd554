/* SPDX-License-Identifier: MIT */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "shared_proto.h"
#include "accounting.h"

/* memcpy and memcmp of the widths that columns have, which the compiler makes loads of. */
static inline void copy(uint8_t *to, const uint8_t *from, uint32_t width)
{
	switch (width) {
	case 1:
		*to = *from;
		break;
	case 2:
		memcpy(to, from, 2);
		break;
	case 4:
		memcpy(to, from, 4);
		break;
	case 8:
		memcpy(to, from, 8);
		break;
	case 16:
		memcpy(to, from, 16);
		break;
	default:
		memmove(to, from, width);
	}
}

static inline int same(const uint8_t *one, const uint8_t *other, uint32_t width)
{
	switch (width) {
	case 1:
		return *one == *other;
	case 2:
		return !memcmp(one, other, 2);
	case 4:
		return !memcmp(one, other, 4);
	case 8:
		return !memcmp(one, other, 8);
	case 16:
		return !memcmp(one, other, 16);
	default:
		return !memcmp(one, other, width);
	}
}

static int has_key(const struct table *t, size_t row, const uint8_t *value)
{
	for (uint32_t i = 0; i < t->column_count; i++) {
		const struct table_column *c = &t->columns[i];

		if (c->key && !same(c->data + row * c->width, value + c->field, c->width))
			return 0;
	}
	return 1;
}

static inline uint64_t hash_of(const struct table *t, const uint8_t *value)
{
	uint64_t hash;

	memcpy(&hash, value + t->value_hash, sizeof(hash));
	return hash;
}

void table_find(const struct table *t, const uint8_t *values, uint32_t count, int64_t *rows)
{
	uint64_t mask = (1ull << t->slot_bits) - 1;

	for (uint32_t i = 0; i < count; i++) {
		const uint8_t *value = values + (size_t)i * t->value_size;
		uint64_t hash = hash_of(t, value), at;

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

		for (uint32_t i = 0; c->given && i < count; i++, from += t->value_size)
			copy(c->data + (size_t)rows[i] * c->width, from, c->width);
	}
	for (uint32_t i = 0; i < count; i++)
		enter(t, mask, (uint32_t)rows[i]);
}

/* Free a slot, and move up those behind that would no more be found. */
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

/* Move the runs of rows to keep to the front of a column; how many rows they have. */
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
	return n;
}

void table_enter(const struct table *t, const int64_t *rows, uint32_t count)
{
	uint64_t mask = (1ull << t->slot_bits) - 1;

	for (uint32_t i = 0; i < count; i++)
		enter(t, mask, (uint32_t)rows[i]);
}

void portmap_renew(const struct portmap *map, const struct port *ports, uint32_t count,
		   const int64_t *rows)
{
	for (uint32_t i = 0; i < count; i++) {
		const struct port *new = &ports[i];
		int64_t row = rows[i];

		if (row < 0)
			continue;
		/* a connection accepted on the listener's own address does not take its place */
		if (new->cookie && !(map->listening[row] && !new->listening && map->cookie[row]))
			map->cookie[row] = new->cookie;
		if (new->comm[0])
			memcpy(map->comm + row * SNIFFER_COMM_LEN, new->comm, SNIFFER_COMM_LEN);
		map->uid[row] = new->uid;
		map->listening[row] |= new->listening;
		if (new->seen_ns > map->seen_ns[row])
			map->seen_ns[row] = new->seen_ns;
	}
}

void portmap_link(const struct portmap *map, const int64_t *rows, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		uint32_t row = (uint32_t)rows[i], last;
		uint16_t port = map->port[row];

		if (map->heads[port]) {
			uint32_t head = map->heads[port] - 1;

			last = map->previous[head];
			map->next[last] = row;
			map->previous[head] = row;
			map->next[row] = head;
			map->previous[row] = last;
		} else {
			map->next[row] = map->previous[row] = row;
			map->heads[port] = row + 1;
		}
		map->counts[port]++;
	}
}

void portmap_unlink(const struct portmap *map, const int64_t *rows, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		uint32_t row = (uint32_t)rows[i];
		uint32_t next = map->next[row], previous = map->previous[row];
		uint16_t port = map->port[row];

		map->next[previous] = next;
		map->previous[next] = previous;
		if (map->heads[port] == row + 1)
			map->heads[port] = next == row ? 0 : next + 1;
		map->counts[port]--;
	}
}

void portmap_rows(const struct portmap *map, uint16_t port, int64_t *rows)
{
	uint32_t row = map->heads[port] - 1;

	for (uint32_t i = 0; i < map->counts[port]; i++) {
		rows[i] = row;
		row = map->next[row];
	}
}

void history_add(const struct history *h, const struct flow *flows, uint32_t count,
		 const int64_t *rows, uint64_t real)
{
	for (uint32_t i = 0; i < count; i++) {
		const struct flow *f = &flows[i];
		int64_t row = rows[i];

		if (row < 0)
			continue;
		h->packets_in[row] += f->packets_in;
		h->bytes_in[row] += f->bytes_in;
		h->packets_out[row] += f->packets_out;
		h->bytes_out[row] += f->bytes_out;
		if (f->first_ns < h->began_ns[row]) {
			h->began_ns[row] = f->first_ns;
			h->first_ns[row] = f->first_ns + real;
		}
		if (f->last_ns >= h->heard_ns[row]) {
			h->heard_ns[row] = f->last_ns;
			h->last_ns[row] = f->last_ns + real;
			h->inode[row] = f->inode;
			h->uid[row] = f->uid;
			h->how[row] = f->how;
			memcpy(h->comm + row * SNIFFER_COMM_LEN, f->comm, SNIFFER_COMM_LEN);
		}
		/* the time of day may have been set back in between */
		if (h->first_ns[row] > h->last_ns[row])
			h->first_ns[row] = h->last_ns[row];
		h->flags[row] |= f->flags;
		h->dirty[row] = 1;
	}
}

struct item {
	uint64_t key;
	uint64_t row;
};

#define DIGIT 11
#define BUCKETS (1u << DIGIT)

/* Sort by key, stable; returns where the sorted ones are: `items` or `spare`. */
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

/* A sum for each group, found by a hash. */
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

/* Room for another group; 0, or -1 without memory. */
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

/* places[row]: the weight of its group up to it, rows in this order. 0, or -1 without memory. */
static int place_in_group(const struct item *in_order, uint32_t count, const uint64_t *group,
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
	return failed ? -1 : 0;
}

/* The rows that go; `items` has room for three times as many items, `places` for as many. */
static int choose(const int64_t *age, const uint64_t *groups, uint32_t group_count,
		  const int64_t *weights, uint32_t count, int64_t keep, uint64_t seed,
		  struct item *items, uint64_t *places, uint8_t *goes)
{
	struct item *by_age = items + count, *spare = by_age + count, *in_order;
	uint64_t left = keep < 0 ? 0 : (uint64_t)keep;

	for (uint32_t i = 0; i < count; i++)
		items[i] = (struct item){ (uint64_t)age[i] ^ 1ull << 63, i };
	in_order = sort(items, spare, count);
	memcpy(by_age, in_order, count * sizeof(*items));
	while (group_count--) {		/* the finest first */
		if (place_in_group(in_order, count, groups + (size_t)group_count * count,
				   weights, seed, places))
			return -1;
		for (uint32_t i = 0; i < count; i++)
			items[i] = (struct item){ places[by_age[i].row], by_age[i].row };
		in_order = sort(items, spare, count);
	}
	memset(goes, 1, count);
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
