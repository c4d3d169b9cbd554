// SPDX-License-Identifier: GPL-2.0-only
/* Finds the connection that this CPU's stack is about to reset. */
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/percpu.h>
#include <linux/tcp.h>
#include <net/tcp_states.h>

#include "reset.h"

/*
 * The connection that the stack of this CPU resets. The reset leaves on another
 * socket, and a lookup no longer finds the connection. The tracepoint writes it
 * right before the packet leaves, with interrupts off. The hook that sees the
 * packet reads and empties it, with preemption off.
 */
struct reset {
	u64 cookie;
	bool listens;
	__be16 sport, dport;
	u8 saddr[16], daddr[16];	/* ports of the packet that is answered */
};

static DEFINE_PER_CPU(struct reset, resets);

/**
 * sniffer_reset_told - note that the stack answers a packet with a reset
 * @sk: the connection or listener, a full socket
 * @skb: the packet, with its transport header set
 */
void sniffer_reset_told(struct sock *sk, const struct sk_buff *skb)
{
	const struct tcphdr *th = tcp_hdr(skb);
	struct reset reset = {
		.cookie = atomic64_read(&sk->sk_cookie), .listens = sk->sk_state == TCP_LISTEN,
		.sport = th->source, .dport = th->dest,
	};
	unsigned long flags;

	if (ip_hdr(skb)->version == 4) {
		memcpy(reset.saddr, &ip_hdr(skb)->saddr, 4);
		memcpy(reset.daddr, &ip_hdr(skb)->daddr, 4);
	} else {
		memcpy(reset.saddr, &ipv6_hdr(skb)->saddr, 16);
		memcpy(reset.daddr, &ipv6_hdr(skb)->daddr, 16);
	}
	local_irq_save(flags);
	*this_cpu_ptr(&resets) = reset;
	local_irq_restore(flags);
}

/**
 * sniffer_reset_take - find the connection of a reset, if it was noted just now
 * @r: the reset; preemption off
 * @listens: set if the socket is a listener, which refuses a connection
 *
 * Return: the socket's cookie, or 0.
 */
u64 sniffer_reset_take(const struct sniffer_record *r, bool *listens)
{
	struct reset *reset = get_cpu_ptr(&resets);
	u64 cookie = reset->cookie;

	*listens = reset->listens;
	if (cookie && ntohs(reset->sport) == r->dport && ntohs(reset->dport) == r->sport &&
	    !memcmp(reset->saddr, r->daddr, 16) && !memcmp(reset->daddr, r->saddr, 16))
		reset->cookie = 0;
	else
		cookie = 0;
	put_cpu_ptr(&resets);
	return cookie;
}
