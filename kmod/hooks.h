/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_HOOKS_H
#define SNIFFER_HOOKS_H

struct sk_buff;
struct sock;

void sniffer_hooks_reset(struct sock *sk, const struct sk_buff *skb);
int sniffer_hooks_init(void);
void sniffer_hooks_exit(void);

#endif /* SNIFFER_HOOKS_H */
