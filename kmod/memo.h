/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_MEMO_H
#define SNIFFER_MEMO_H

#include <linux/netfilter.h>
#include <linux/preempt.h>
#include <linux/sched.h>
#include <linux/skbuff.h>

#include "lookup.h"

bool sniffer_memo_in4(struct sk_buff *skb, const struct nf_hook_state *state);
bool sniffer_memo_out4(struct sk_buff *skb, const struct nf_hook_state *state);
bool sniffer_memo_in6(struct sk_buff *skb, const struct nf_hook_state *state);
bool sniffer_memo_out6(struct sk_buff *skb, const struct nf_hook_state *state);
void sniffer_memo_keep(const struct sniffer_flow *flow, bool trusted);
int sniffer_memo_init(void);
void sniffer_memo_exit(void);

/*
 * May current be taken for the sender? With bottom halves off this may be work for
 * another task (a write to a tun runs the whole stack). A test of current->mm would
 * lose the FIN of an exiting process.
 */
static inline bool sniffer_trust_current(void)
{
	return in_task() && !softirq_count() && !(current->flags & PF_KTHREAD);
}

#endif /* SNIFFER_MEMO_H */
