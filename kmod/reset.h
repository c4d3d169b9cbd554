/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_RESET_H
#define SNIFFER_RESET_H

#include <linux/skbuff.h>
#include <net/sock.h>

#include "shared_proto.h"

void sniffer_reset_told(struct sock *sk, const struct sk_buff *skb);
u64 sniffer_reset_take(const struct sniffer_record *r, bool *listens);

#endif /* SNIFFER_RESET_H */
