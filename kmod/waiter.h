/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_WAITER_H
#define SNIFFER_WAITER_H

#include <net/sock.h>

#include "shared_proto.h"

void sniffer_waiter_name(struct sniffer_record *r, struct sock *sk);

#endif /* SNIFFER_WAITER_H */
