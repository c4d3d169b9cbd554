/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_SNAP_H
#define HUNTER_SNAP_H
/*
 * The first bytes of packets, while user space wants them. Only the hooks of a cgroup
 * can read a packet that is not in one piece. Its bytes come right after the record for
 * incoming and outgoing packets, and before it where parts send.
 */
#include "hunter.h"

struct snap {
	struct sniffer_snap head;
	u8 data[SNIFFER_SNAP_LEN];
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 << 20);
} snaps SEC(".maps");

/* What user space asks for. So far only: does it want snaps? */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, u64);
} wishes SEC(".maps");

/* A snap of this processor that waits for its bytes, or bytes that wait for their record. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct snap);
} halves SEC(".maps");

/* Where a packet and its headers are. */
struct shape {
	u64 net;	/* address of the IP header */
	u32 len;	/* from there on */
	u32 thoff;	/* of the transport header from there, 0: to be found */
	u64 end;	/* address of struct skb_shared_info */
	u32 linear;	/* bytes from the IP header on that lie in one piece */
	u32 unused;
};

static __always_inline bool snaps_wanted(void)
{
	u32 zero = 0;
	u64 *wish = bpf_map_lookup_elem(&wishes, &zero);

	return wish && *wish;
}

static __always_inline struct snap *snap_half(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&halves, &zero);
}

static __always_inline u32 snap_size(u32 len)
{
	return len < SNIFFER_SNAP_LEN ? len : SNIFFER_SNAP_LEN;
}

static __always_inline void snap_head(struct snap *snap, struct sniffer_record *r)
{
	snap->head.time_ns = r->time_ns;
	snap->head.seq = r->seq;
	snap->head.len = r->len;
	snap->head.cpu = r->cpu;
	snap->head.caplen = snap_size(r->len);
	snap->head.reserved = 0;
}

/* Makes the snap of a record that is on its way to the reader. */
__noinline int snap_record(struct sniffer_record *r, struct shape *s)
{
	struct snap *snap, *half;
	u64 there = 0, here = 1;
	u32 size;

	if (!r || !s)
		return 0;
	size = snap_size(s->len);
	half = snap_half();
	if (!half)
		return 0;
	if (s->linear < size) {
		if (!parts) {
			snap_head(half, r);
			return 0;
		}
		/* are these its bytes? */
		bpf_probe_read_kernel(&here, sizeof(here), (void *)(s->net + 12));
		bpf_probe_read_kernel(&there, sizeof(there), half->data + 12);
		if (half->head.len != s->len || here != there)
			return 0;
	}
	snap = bpf_ringbuf_reserve(&snaps, sizeof(*snap), 0);
	if (!snap)
		return 0;
	snap_head(snap, r);
	if (s->linear < size)
		bpf_probe_read_kernel(snap->data, sizeof(snap->data), half->data);
	else if (bpf_probe_read_kernel(snap->data, size & 0xff, (void *)s->net))
		snap->head.caplen = 0;
	bpf_ringbuf_submit(snap, BPF_RB_NO_WAKEUP);
	return 0;
}

static __always_inline long snap_load(struct __sk_buff *skb, u8 *to)
{
	u32 size = snap_size(skb->len);

	/* only so does the verifier of 6.1 know that it is not 0 */
	return bpf_skb_load_bytes(skb, 0, to, ((size - 1) & (SNIFFER_SNAP_LEN - 1)) + 1);
}

#ifdef HUNTER_PARTS
/* Makes the snap of the packet that a cgroup's hook has. */
static __always_inline void snap_at_hand(struct sniffer_record *r, struct __sk_buff *skb)
{
	struct snap *snap = bpf_ringbuf_reserve(&snaps, sizeof(*snap), 0);

	if (!snap)
		return;
	snap_head(snap, r);
	if (snap_load(skb, snap->data))
		snap->head.caplen = 0;
	bpf_ringbuf_submit(snap, BPF_RB_NO_WAKEUP);
}

/* The bytes come before the record. */
SEC("cgroup_skb/egress")
int part_bytes(struct __sk_buff *skb)
{
	struct snap *half = snaps_wanted() ? snap_half() : NULL;

	if (half)
		half->head.len = snap_load(skb, half->data) ? 0 : skb->len;
	return 1;
}
#else
/* Takes the bytes of the packet that was reported a moment ago. */
static __always_inline int bytes_of(struct __sk_buff *skb)
{
	struct snap *half = snaps_wanted() ? snap_half() : NULL;
	struct snap *snap;

	if (!half || half->head.len != skb->len)
		return 1;
	snap = bpf_ringbuf_reserve(&snaps, sizeof(*snap), 0);
	if (!snap)
		return 1;
	snap->head = half->head;
	half->head.len = 0;
	if (snap_load(skb, snap->data))
		snap->head.caplen = 0;
	bpf_ringbuf_submit(snap, BPF_RB_NO_WAKEUP);
	return 1;
}

SEC("cgroup_skb/egress")
int bytes_out(struct __sk_buff *skb) { return bytes_of(skb); }
SEC("cgroup_skb/ingress")
int bytes_in(struct __sk_buff *skb) { return bytes_of(skb); }
#endif

#endif /* HUNTER_SNAP_H */
