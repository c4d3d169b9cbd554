/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Counts the packets that the kernel drops, by socket and by the kernel's reason.
 * Nothing runs for a packet that is not dropped.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>

#define REASONS		256	/* Linux 6.18 has 130; others count as the last one */
#define ETH_P_IP	0x0800
#define ETH_P_IPV6	0x86DD

/* A socket by its cookie, or by its local end while it has none. */
struct drop_key {
	u64 cookie;
	u32 reason;
	u32 netns;
	u16 port;
	u16 proto;
	u32 unused;
};

struct ownerless {
	u64 packets[REASONS];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct drop_key);
	__type(value, u64);
} drops SEC(".maps");

/* A row for each processor. User space maps it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, struct ownerless);
} ownerless SEC(".maps");

/*
 * Packets of IP without a socket, without a reason, or without room in drops. The
 * kernel frees one packet of each TCP connection so that it was received, without a reason.
 */
static __always_inline int count_ownerless(u32 reason)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct ownerless *row = bpf_map_lookup_elem(&ownerless, &cpu);

	if (reason >= REASONS)
		reason = REASONS - 1;
	asm volatile("" : "+r"(reason));	/* the verifier sees the bound only in the mask */
	if (row)
		__sync_fetch_and_add(&row->packets[reason & (REASONS - 1)], 1);
	return 0;
}

static __always_inline int count(const struct drop_key *key)
{
	u64 *packets, one = 1;

	packets = bpf_map_lookup_elem(&drops, key);
	if (packets) {
		__sync_fetch_and_add(packets, 1);
		return 0;
	}
	if (!bpf_map_update_elem(&drops, key, &one, BPF_NOEXIST))
		return 0;
	/* another processor may have been first */
	packets = bpf_map_lookup_elem(&drops, key);
	if (!packets)
		return count_ownerless(key->reason);
	__sync_fetch_and_add(packets, 1);
	return 0;
}

/* A packet of TCP or UDP that a socket sent or would have received. */
static __always_inline int count_socket(struct sock *sk, u32 reason)
{
	struct drop_key key = { .reason = reason };
	u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);
	u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);

	if (family != AF_INET && family != AF_INET6)
		return 0;
	key.proto = IPPROTO_TCP;
	if (state == TCP_NEW_SYN_RECV)		/* a handshake: it is its listener's */
		sk = BPF_CORE_READ(sk, __sk_common.skc_listener);
	else if (state != TCP_TIME_WAIT)
		key.proto = BPF_CORE_READ(sk, sk_protocol);
	if (key.proto != IPPROTO_TCP && key.proto != IPPROTO_UDP)
		return 0;
	key.cookie = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
	if (key.cookie) {
		key.proto = 0;
	} else {
		key.netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
		key.port = BPF_CORE_READ(sk, __sk_common.skc_num);
	}
	return count(&key);
}

static __always_inline int count_packet(struct sk_buff *skb, u32 reason, struct sock *sk)
{
	u16 proto = skb->protocol;

	if (sk && reason != bpf_core_enum_value(enum skb_drop_reason___x,
						SKB_DROP_REASON_NOT_SPECIFIED___x))
		return count_socket(sk, reason);
	if (proto == bpf_htons(ETH_P_IP) || proto == bpf_htons(ETH_P_IPV6))
		return count_ownerless(reason);
	return 0;
}

/* Linux 6.11 and later say who would have received the packet. */
SEC("tp_btf/kfree_skb")
int BPF_PROG(drop_received, struct sk_buff *skb, void *place, u32 reason, struct sock *receiver)
{
	return count_packet(skb, reason, receiver ?: BPF_CORE_READ(skb, sk));
}

/* Linux 5.17 and later */
SEC("tp_btf/kfree_skb")
int BPF_PROG(drop_given, struct sk_buff *skb, void *place, u32 reason)
{
	return count_packet(skb, reason, BPF_CORE_READ(skb, sk));
}

char LICENSE[] SEC("license") = "GPL";
