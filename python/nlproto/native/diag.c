/* SPDX-License-Identifier: MIT */
/* Requests to sock_diag, and its answers (man 7 sock_diag). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <linux/tcp.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

#include "shared_proto.h"
#include "host.h"

#define SMALLEST sizeof(struct inet_diag_msg) /* bytes of an answer, at least */

/* The answers of sock_diag in one datagram. */
struct diag_answers {
	const uint8_t *buf;
	uint32_t len, seq, at;
	int done; /* no further datagram will come */
};

/*
 * Read the next answer to request @seq into @d; @attrs gets its attributes, which end
 * at @end. Returns 1; 0 when there is none left; -errno if the kernel reports an error
 * or the data is damaged.
 */
static int next_answer(struct diag_answers *a, struct inet_diag_msg *d, const uint8_t **attrs,
		       const uint8_t **end)
{
	while (a->at + sizeof(struct nlmsghdr) <= a->len) {
		const uint8_t *message = a->buf + a->at;
		struct nlmsghdr h;
		int code = 0;

		memcpy(&h, message, sizeof(h));
		if (h.nlmsg_len < sizeof(h) || h.nlmsg_len > a->len - a->at)
			return -EBADMSG;
		a->at += NLMSG_ALIGN(h.nlmsg_len);
		if (h.nlmsg_seq != a->seq)
			continue;
		if (h.nlmsg_type == NLMSG_ERROR || h.nlmsg_type == NLMSG_DONE) {
			if (h.nlmsg_len >= sizeof(h) + sizeof(code))
				memcpy(&code, message + sizeof(h), sizeof(code));
			a->done = 1;
			return code < 0 ? code : 0;
		}
		if (h.nlmsg_len < sizeof(h) + sizeof(*d))
			return -EBADMSG;
		memcpy(d, message + sizeof(h), sizeof(*d));
		*attrs = message + sizeof(h) + sizeof(*d);
		*end = message + h.nlmsg_len;
		return 1;
	}
	return 0;
}

static uint64_t cookie_of(const struct inet_diag_msg *d)
{
	return (uint64_t)d->id.idiag_cookie[1] << 32 | d->id.idiag_cookie[0];
}

/* Attribute @type behind a sock_diag message; its size, or -1. */
static int attribute(const uint8_t *at, const uint8_t *end, uint16_t type, const uint8_t **value)
{
	while (at + sizeof(struct nlattr) <= end) {
		struct nlattr a;

		memcpy(&a, at, sizeof(a));
		if (a.nla_len < sizeof(a) || a.nla_len > end - at)
			return -1;
		if (a.nla_type == type) {
			*value = at + sizeof(a);
			return (int)(a.nla_len - sizeof(a));
		}
		if (NLA_ALIGN(a.nla_len) > end - at)
			return -1;
		at += NLA_ALIGN(a.nla_len);
	}
	return -1;
}

/* The tcp_info behind a sock_diag message, of which the kernel may know less than we do. */
static int tcp_info_of(const uint8_t *at, const uint8_t *end, struct tcp_info *info)
{
	const uint8_t *value;
	int size = attribute(at, end, INET_DIAG_INFO, &value);

	if (size < (int)offsetof(struct tcp_info, tcpi_pacing_rate))
		return 0;
	memset(info, 0, sizeof(*info));
	memcpy(info, value, (size_t)size < sizeof(*info) ? (size_t)size : sizeof(*info));
	return 1;
}

static uint32_t drops_of(const uint8_t *at, const uint8_t *end)
{
	const size_t place = SK_MEMINFO_DROPS * sizeof(uint32_t);
	const uint8_t *value;
	uint32_t drops = 0;

	if (attribute(at, end, INET_DIAG_SKMEMINFO, &value) >= (int)(place + sizeof(drops)))
		memcpy(&drops, value + place, sizeof(drops));
	return drops;
}

int host_diag_read(const uint8_t *buf, uint32_t len, uint32_t seq, uint8_t proto,
		   struct host_socket *sockets, uint32_t max, int *done)
{
	struct diag_answers answers = { .buf = buf, .len = len, .seq = seq };
	const uint8_t *attrs, *end;
	struct inet_diag_msg d;
	uint32_t n = 0;
	int more;

	while ((more = next_answer(&answers, &d, &attrs, &end)) > 0) {
		struct host_socket *s;

		if (n == max) {
			more = -ENOBUFS;
			break;
		}
		s = &sockets[n++];
		memset(s, 0, sizeof(*s));
		s->cookie = cookie_of(&d);
		s->inode = d.idiag_inode;
		s->uid = d.idiag_uid;
		s->ifindex = d.id.idiag_if;
		s->sport = ntohs(d.id.idiag_sport);
		s->dport = ntohs(d.id.idiag_dport);
		s->family = d.idiag_family;
		s->proto = proto;
		s->state = d.idiag_state;
		memcpy(s->saddr, d.id.idiag_src, 16);
		memcpy(s->daddr, d.id.idiag_dst, 16);
		s->drops = drops_of(attrs, end);
	}
	*done = answers.done;
	return more < 0 ? more : (int)n;
}

int host_exchange(int fd, const uint8_t *request, uint32_t length, uint8_t *buf, uint32_t size,
		  int patience_ms)
{
	struct pollfd readable = { .fd = fd, .events = POLLIN };

	if (length && send(fd, request, length, 0) < 0)
		return -errno;
	for (;;) {
		ssize_t len = recv(fd, buf, size, MSG_DONTWAIT | MSG_TRUNC);

		if (len >= 0)
			return len > size ? -EMSGSIZE : (int)len;
		if (errno != EAGAIN && errno != EINTR)
			return -errno;
		if (errno == EAGAIN && !poll(&readable, 1, patience_ms))
			return -ETIMEDOUT;
	}
}

int host_diag_ask(int fd, const uint8_t *request, uint32_t length, uint8_t *buf, uint32_t size,
		  uint32_t seq, uint8_t proto, struct host_socket *found, uint32_t max, int *done,
		  int patience_ms)
{
	uint32_t n = 0;

	*done = 0;
	while (!*done && (!n || max - n >= size / SMALLEST)) {
		int read = host_exchange(fd, request, length, buf, size, patience_ms);

		if (read >= 0)
			read = host_diag_read(buf, (uint32_t)read, seq, proto, found + n, max - n,
					      done);
		if (read < 0)
			return read;
		n += (uint32_t)read;
		length = 0;
	}
	return (int)n;
}

uint32_t host_diag_find(int fd, const uint8_t *requests, uint32_t length, uint32_t count,
			uint8_t *buf, uint32_t size, struct host_socket *found, int *results,
			int patience_ms)
{
	const size_t head = sizeof(struct nlmsghdr);
	uint32_t i;

	for (i = 0; i < count; i++) {
		const uint8_t *request = requests + (size_t)i * length;
		struct inet_diag_req_v2 asked;
		struct nlmsghdr h;
		int done;

		memcpy(&h, request, head);
		memcpy(&asked, request + head, sizeof(asked));
		results[i] = host_diag_ask(fd, request, length, buf, size, h.nlmsg_seq,
					   asked.sdiag_protocol, found + i, 1, &done, patience_ms);
		if (results[i] < 0 && results[i] != -ENOENT)
			return i + 1;
	}
	return count;
}

int host_tcp_read(const uint8_t *buf, uint32_t len, uint32_t seq, struct host_tcp *found,
		  uint32_t max, int *done)
{
	struct diag_answers answers = { .buf = buf, .len = len, .seq = seq };
	const uint8_t *attrs, *end;
	struct inet_diag_msg d;
	struct tcp_info info;
	uint32_t n = 0;
	int more;

	while ((more = next_answer(&answers, &d, &attrs, &end)) > 0) {
		if (n == max) {
			more = -ENOBUFS;
			break;
		}
		if (!d.id.idiag_dport || !tcp_info_of(attrs, end, &info))
			continue;
		found[n++] = (struct host_tcp){
			.cookie = cookie_of(&d),
			.rtt_us = info.tcpi_rtt,
			.retransmits = info.tcpi_total_retrans,
		};
	}
	*done = answers.done;
	return more < 0 ? more : (int)n;
}
